"""What runs recorded, as data frames."""

from pathlib import Path
from typing import TYPE_CHECKING

from saftnb.run_folder import find_runs, grid_runs, read_json

if TYPE_CHECKING:
    import pandas


def results(path: Path | str = "runs") -> "pandas.DataFrame":
    """One row per run under ``path``: its grid, run, notebook, status, seconds, parameters and recorded scalars.

    A run that is not done, or whose files were altered since, has missing values for what it recorded: part of a run
    is no result. A recorded name that is also a column becomes ``results.<name>``. Lists, dicts and tables stay in the
    run's ``results.json``.
    """
    import pandas

    rows = []
    for folder in find_runs(path):
        said = folder.manifest
        status = "altered" if said["status"] == "done" and not folder.done else said["status"]
        row = {"grid": said["grid"], "run": folder.name, "notebook": said["notebook"], "status": status}
        row["seconds"] = said.get("seconds")
        recorded = folder.results if folder.done else {}
        scalars = {name: value for name, value in recorded.items() if not isinstance(value, (list, dict))}
        for prefix, values in (("parameters", said["parameters"]), ("results", scalars)):
            row |= {f"{prefix}.{name}" if name in row else name: value for name, value in values.items()}
        rows.append(row)
    return pandas.DataFrame(rows, columns=None if rows else ["grid", "run", "notebook", "status", "seconds"])


def tables(path: Path | str, name: str) -> "pandas.DataFrame":
    """The recorded table ``name`` of every run under ``path`` that has one, in one frame.

    ``path`` is a grid's folder of runs (of which those that its file names now are read) or a list that
    ``saftnb keep`` wrote. The columns are those of the tables, after
    ``run`` and the scalar parameters of each run; a column that is also a parameter keeps the table's value.
    Raises FileNotFoundError where there is nothing, ValueError where no run recorded such a table.
    """
    import pandas

    path = Path(path)
    if path.is_file():
        entries = [(e["id"], e["manifest"]["parameters"], e["results"]) for e in read_json(path)["runs"]]
    else:
        entries = [(run.name, run.parameters, run.results) for run in grid_runs(path) if run.done]
    frames = []
    for run, parameters, recorded in entries:
        table = recorded.get(name)
        if isinstance(table, dict) and table.get("type") == "table":
            frame = pandas.DataFrame(table["data"], columns=table["columns"])
            scalars = {k: v for k, v in parameters.items() if not isinstance(v, (list, dict)) and k not in frame}
            frames.append(pandas.DataFrame({"run": run, **scalars}, index=frame.index).join(frame))
    if not frames:
        raise ValueError(f"{path.name}: no done run recorded a table {name!r}")
    filled = [frame for frame in frames if len(frame)]  # an empty table would turn columns of numbers into objects
    return pandas.concat(filled or frames, ignore_index=True)
