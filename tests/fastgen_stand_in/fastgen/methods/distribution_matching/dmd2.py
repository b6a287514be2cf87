"""Both updates of DMD2 on given predictions, through names that were imported."""

from fastgen.methods.common_loss import (
    denoising_score_matching_loss,
    gan_loss_discriminator,
    gan_loss_generator,
    variational_score_distillation_loss,
)


class DMD2Model:
    def __init__(self, noise_scheduler):
        self.noise_scheduler = noise_scheduler

    def student_update(self, x, eps, t, teacher, fake_score, head, additional_scale=None):
        x_t = self.noise_scheduler.forward_process(x, eps, t)
        teacher_x0 = self.noise_scheduler.eps_to_x0(x_t, teacher(x_t), t)
        fake_x0 = self.noise_scheduler.eps_to_x0(x_t, fake_score(x_t), t)
        loss = variational_score_distillation_loss(x, teacher_x0, fake_x0, additional_scale)
        return loss + gan_loss_generator(head(x_t))

    def fake_score_update(self, x, real, eps, t, fake_score, head):
        x_t, real_t = (self.noise_scheduler.forward_process(images, eps, t) for images in (x, real))
        x0 = self.noise_scheduler.eps_to_x0(x_t, fake_score(x_t), t)
        prediction = self.noise_scheduler.x0_to_eps(x_t, x0, t)
        loss = denoising_score_matching_loss("eps", prediction, eps=eps)
        return loss + gan_loss_discriminator(head(real_t), head(x_t))
