"""Evaluation of students and teachers: lm-eval, code tasks and their sandbox, metrics."""
