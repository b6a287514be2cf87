"""LADD: the adversarial losses alone."""

from fastgen.methods.common_loss import gan_loss_discriminator, gan_loss_generator


def losses(real_logits, fake_logits):
    return gan_loss_generator(fake_logits) + gan_loss_discriminator(real_logits, fake_logits)
