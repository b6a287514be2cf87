"""CausVid: DMD2 on videos, frames at times of their own."""

from fastgen.methods.common_loss import denoising_score_matching_loss as dsm
from fastgen.methods.distribution_matching.dmd2 import DMD2Model


class CausVidModel(DMD2Model):
    def velocity_loss(self, net_pred, x0, eps, t):
        return dsm("v", net_pred, x0=x0, eps=eps, noise_scheduler=self.noise_scheduler, t=t)
