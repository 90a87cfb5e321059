"""Train a few models of a kept list again and compare their weights, bit by bit (`make spot-check`).

    python tests/tools/spot_check.py reports/pocket-seeds/runs.json [COUNT] [SEED]

On the kind of CPU that made the list the hashes are equal; on another kind the last bits may differ.
"""

import os
import sys
import tempfile

from saftnb.batch import tables
from saftnb.finetune import finetune, matched, recipe
from saftnb.suites import load_suite


def main(path: str, count: int = 3, seed: int = 0) -> int:
    rows = tables(path, "individual").sample(count, random_state=seed)
    unequal = 0
    with tempfile.TemporaryDirectory() as store:
        os.environ["SAFTNB_STORE"] = store
        for row in rows.itertuples():
            suite = load_suite(row.suite, backbone=row.backbone, split=row.seed)
            if row.recipe.endswith("-matched"):
                plan = matched(recipe(row.recipe.removesuffix("-matched"), suite), row.stop_at)
            else:
                plan = recipe(row.recipe, suite)
            found = finetune(suite, row.task, plan, row.seed, device="cpu", progress=False)
            same = found.weights_sha256 == row.weights
            unequal += not same
            what = f"{row.backbone} seed {row.seed} {row.recipe} {row.task}"
            print(
                f"{what}: {'equal' if same else 'DIFFERENT'}, kept {row.weights[:12]}, here {found.weights_sha256[:12]}"
            )
    print(f"{count - unequal} of {count} equal")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
