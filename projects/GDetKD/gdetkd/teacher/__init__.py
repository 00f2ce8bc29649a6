from .base import TeacherFile
from .files import read_teacher_file
from .frozen import FrozenTeacher
from .head_transfer import transfer_heads, transferable
from .weights import CompleteCheckpointer, LoadedWeights, load_weights

__all__ = [
    "CompleteCheckpointer",
    "FrozenTeacher",
    "TeacherFile",
    "LoadedWeights",
    "load_weights",
    "read_teacher_file",
    "transfer_heads",
    "transferable",
]
