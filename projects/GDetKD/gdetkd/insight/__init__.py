"""What distillation does to a student, measured: which levels match, which classes are alike, who finds what."""
