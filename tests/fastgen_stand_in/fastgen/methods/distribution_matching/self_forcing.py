"""Self-Forcing: CausVid on its own rollouts."""

from fastgen.methods.common_loss import variational_score_distillation_loss
from fastgen.methods.distribution_matching.causvid import CausVidModel


class SelfForcingModel(CausVidModel):
    def student_loss(self, x, teacher_x0, fake_x0):
        return variational_score_distillation_loss(x, teacher_x0, fake_x0)
