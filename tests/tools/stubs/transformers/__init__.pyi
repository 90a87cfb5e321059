# In place of transformers' own types: pyright would read 2 800 files for them, which takes longer than all the rest.
from typing import Any

def __getattr__(name: str) -> Any: ...
