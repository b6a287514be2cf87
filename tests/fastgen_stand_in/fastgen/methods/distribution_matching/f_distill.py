"""f-distill: DMD2 with a scale for each sample."""

from fastgen.methods.common_loss import gan_loss_generator, variational_score_distillation_loss


def student_update(x, teacher_x0, fake_x0, logits):
    scale = logits.detach().exp().flatten()
    return variational_score_distillation_loss(x, teacher_x0, fake_x0, scale) + gan_loss_generator(logits)
