"""What sentence pairs give away without fine-tuning: bag of words, and the frozen language model.

scikit-learn, which takes seconds to import, is imported where it is used.
"""

import torch

from saftnb.backbones import resolve_device
from saftnb.suites import PairSplit, PairSuite, PairTask


def bag_of_words_accuracy(task: PairTask, pairs: int | None = None) -> float:
    """Test accuracy of a logistic regression on which words stand in the premise and which in the hypothesis, 0 to 1.

    Args:
        pairs: the first so many training pairs, in place of all.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def texts(split: PairSplit) -> list[str]:
        sides = (split.premises, split.hypotheses)
        return [
            " ".join(f"{side}_{word}" for side in (0, 1) for word in sides[side][i].split()) for i in range(len(split))
        ]

    train = task.train[:pairs]
    model = make_pipeline(CountVectorizer(binary=True, token_pattern=r"\S+"), LogisticRegression(max_iter=2000))
    model.fit(texts(train), train.labels.numpy())
    return float(model.score(texts(task.test), task.test.labels.numpy()))


@torch.no_grad()
def frozen_accuracy(suite: PairSuite, task: str, pairs: int | None = None, *, device: str = "auto") -> float:
    """Test accuracy of a logistic regression on what the frozen model makes of a pair (its pooled state), 0 to 1."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    where, tower = resolve_device(device), suite.tower()
    tower.to(where)

    def states(split: PairSplit) -> torch.Tensor:
        tokens = split.inputs
        order = tokens.lengths.argsort(stable=True)
        found = torch.cat([tower(tokens[some].to(where)).cpu() for some in order.split(100)])
        return found[order.argsort()]

    chosen = suite.tasks[task]
    train = chosen.train[:pairs]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(states(train).numpy(), train.labels.numpy())
    return float(model.score(states(chosen.test).numpy(), chosen.test.labels.numpy()))
