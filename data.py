from contextlib import contextmanager
import os
from pathlib import Path
class UserError(Exception):
    """x"""
@contextmanager
def atomic(path):
    """Yields a temporary path beside `path`; it takes the name of `path` once it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
vae_pixels = vit_pixels = None
