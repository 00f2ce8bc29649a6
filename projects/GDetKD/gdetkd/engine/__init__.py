from .teacher_evaluation import evaluate_teacher
from .trainer import DistillTrainer, build_plain_student

__all__ = ["DistillTrainer", "build_plain_student", "evaluate_teacher"]
