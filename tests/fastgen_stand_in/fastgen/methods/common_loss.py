"""The losses, in plain PyTorch."""

import torch.nn.functional as F


def denoising_score_matching_loss(pred_type, net_pred, x0=None, eps=None, noise_scheduler=None, t=None):
    if pred_type == "x0":
        assert x0 is not None
        target = x0
    elif pred_type == "eps":
        assert eps is not None
        target = eps
    elif pred_type == "v":
        assert x0 is not None and eps is not None and noise_scheduler is not None and t is not None
        alpha, sigma = (
            noise_scheduler.column(noise_scheduler.alpha(t), x0),
            noise_scheduler.column(noise_scheduler.sigma(t), x0),
        )
        target = (alpha * eps - sigma * x0).to(net_pred.dtype)
    elif pred_type == "flow":
        assert x0 is not None and eps is not None
        target = eps - x0
    else:
        raise NotImplementedError(pred_type)
    return F.mse_loss(net_pred, target.detach())


def variational_score_distillation_loss(gen_data, teacher_x0, fake_score_x0, additional_scale=None):
    distance = (gen_data - teacher_x0).abs().flatten(1).mean(1)
    weight = 1 / (distance + 1e-6)
    if additional_scale is not None:
        weight = (weight * additional_scale.reshape(-1)).to(weight.dtype)
    weight = weight.reshape(-1, *[1] * (gen_data.ndim - 1))
    target = gen_data - (fake_score_x0 - teacher_x0) * weight
    return 0.5 * F.mse_loss(gen_data, target.detach())


def gan_loss_generator(fake_logits):
    assert fake_logits.ndim == 2, fake_logits.shape
    return F.softplus(-fake_logits).mean()


def gan_loss_discriminator(real_logits, fake_logits):
    assert real_logits.ndim == 2, real_logits.shape
    assert fake_logits.ndim == 2, fake_logits.shape
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
