"""The frozen teacher: run at every step, or once for M fixed views of every image and read back from a file."""

from .build import build_teacher
from .cache import CachedTeacher, CacheKey, CacheRejected
from .frozen import FrozenTeacher, state_digest

Teacher = FrozenTeacher | CachedTeacher

__all__ = [
    "CacheKey",
    "CacheRejected",
    "CachedTeacher",
    "FrozenTeacher",
    "Teacher",
    "build_teacher",
    "state_digest",
]
