"""Distillation: data, teachers, soft targets, losses, the objective and the trainer."""
