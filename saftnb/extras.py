"""What is not installed, named with the extra that brings it. Imports nothing."""

from importlib.metadata import PackageNotFoundError, requires

# Packages whose module is called otherwise
_MODULES = {
    "open_clip_torch": "open_clip", "pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml",
    "nvidia-ml-py": "pynvml",
}  # fmt: skip
_BROUGHT = {"transformers": "full"}  # by a package of an extra


def extra_of(module: str) -> str:
    """The extra of `pip install 'saftnb[…]'` that brings a module; "" where none is known to."""
    top = module.partition(".")[0]
    try:
        listed = requires("saftnb") or []
    except PackageNotFoundError:
        return ""
    for order in ("full", "notebooks", "cluster", "pretrain", "test"):
        for line in listed:
            package, _, condition = line.partition(";")
            name = package.strip().split("[")[0].split(">")[0].split("=")[0].split("<")[0].split("!")[0].strip()
            if f'"{order}"' in condition.replace("'", '"') and _MODULES.get(name, name.replace("-", "_")) == top:
                return order
    return _BROUGHT.get(top, "")


def missing(error: ModuleNotFoundError) -> str:
    """One line on what to install, for a module that was not found."""
    name = error.name or ""
    extra = extra_of(name)
    if not extra:
        return str(error)
    return f"this needs {name.partition('.')[0]}, which is not installed: pip install 'saftnb[{extra}]'"
