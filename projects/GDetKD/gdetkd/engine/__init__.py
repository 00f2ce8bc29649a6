from .trainer import DistillTrainer, build_plain_student, evaluate_teacher

__all__ = ["DistillTrainer", "build_plain_student", "evaluate_teacher"]
