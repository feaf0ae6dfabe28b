"""The exercises: `checking`, `predicting`, and one module per notebook with each check and its reference answer.

Every module here is imported, and so registered, by its mere presence.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
