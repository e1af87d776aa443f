"""Sampling of MAR: a few tokens a step along an order, each drawn by the diffusion head.

The same distribution as the reference's loop (arXiv 2406.11838, appendix), with less work: the numbers of tokens are
known beforehand, so nothing is searched for; both conditions run in one batch; the encoder sees the known tokens only,
and the last decoder block runs for the wanted ones only; the head keeps one state a token (`DiffusionHead.sample`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..order import ClassOrderBank, CollapseError, GenerationOrder, Order, tokens_per_step
from ..order.errors import describe
from ..order.sorting import stable_argsort
from .diffusion_process import draw_normal, schedule
from .transformer import gather_tokens, scatter_tokens

GUIDANCE_SCHEDULES = ("linear", "constant")


class GenerateMixin:
    """`generate` of MAR."""

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor | Sequence[int],
        steps: int = 64,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "linear",
        temperature: float = 1.0,
        order: str | Order | Tensor | ClassOrderBank | GenerationOrder | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        diffusion_steps: int | tuple[int, int] | None = None,
        latents: Tensor | None = None,
        regenerate: Tensor | None = None,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Generate latents of images.

        Args:
            labels: (B,) classes; an unconditional model only counts them.
            steps: Iterations T in [1, number of tokens]; the plan of tokens is MAR's cosine one (`tokens_per_step`).
            guidance_scale: Classifier-free guidance, 1 for none.
            guidance_schedule: "linear": from 1 up with the share of known tokens; "constant".
            temperature: Factor on the noise of the diffusion steps, at least 0.
            order: Which tokens come first: a name of `GENERATION_ORDERS`, a `ClassOrderBank`, an `Order`, a best-first
                long tensor (B, L), or a `GenerationOrder`. None: from the model's bank, random if it has none.
            noise: (B, L, token_dim): what the diffusion of each token starts from; by default drawn.
            generator: All randomness; torch's own by default. The same seed gives the same images.
            diffusion_steps: Of the head; two numbers: annealed from the first to the second along the iterations
                (DiSA). By default the model's `num_sampling_steps`.
            latents: (B, C, h, w): images to change.
            regenerate: (L,) or (B, L) bool: the tokens that are made anew, as many in every row; all others are kept.
            callback: Called after each iteration with its number, the latents so far (zeros where nothing is yet), and
                (B, L) bool, True where a token is known.

        Returns:
            Latents (B, C, h, w) float32, for `model.codec().decode`.

        Raises:
            CollapseError: For arguments of other shapes or ranges, or latents that are not finite.
        """
        device = self.fake_latent.device
        labels = torch.as_tensor(labels, device=device)
        self.check_labels(labels)
        batch = len(labels)
        if guidance_schedule not in GUIDANCE_SCHEDULES:
            raise CollapseError(f"guidance_schedule: must be linear or constant, got {guidance_schedule!r}")
        for name, value in (("temperature", temperature), ("guidance_scale", guidance_scale)):
            if not 0 <= value < float("inf"):
                raise CollapseError(f"{name}: must be a finite number of at least 0, got {value!r}")
        shape = (batch, self.seq_len, self.token_dim)
        if noise is None:
            noise = draw_normal(shape, generator, device)
        elif tuple(noise.shape) != shape or not noise.isfinite().all():
            raise CollapseError(f"noise: must be finite and of shape {shape}, got {describe(noise)}")
        known, tokens = self._given(latents, regenerate, batch)
        chooser = self._chooser(order)
        ranks = None if chooser.dynamic else chooser(labels, generator).to(device).ranks
        done = int(known[0].sum())
        plan = tokens_per_step(self.seq_len - done, steps)
        anneal = _annealed(self.num_sampling_steps if diffusion_steps is None else diffusion_steps, steps)
        for number in set(anneal):
            schedule(number)  # raises before anything is generated

        was_training = self.training
        self.eval()
        try:
            for step, count in enumerate(plan):
                done += count
                # the reference counts the last token as unknown even in its last step
                share = min(done, self.seq_len - 1) / self.seq_len if guidance_schedule == "linear" else 1.0
                scale = 1 + (guidance_scale - 1) * share
                z, z_uncond, wanted = self._conditions(tokens, known, labels, count, ranks, scale != 1)
                start = gather_tokens(noise.to(device), wanted).flatten(0, 1)
                drawn = self.diffloss.sample(
                    z, start, anneal[step], scale, z_uncond, temperature, generator, self.latent_bound
                )
                tokens = scatter_tokens(drawn.view(batch, count, -1), wanted, tokens)
                known = known.scatter(1, wanted, torch.ones_like(wanted, dtype=torch.bool))
                if callback:
                    callback(step, self.unpatchify(tokens), known)
        finally:
            self.train(was_training)
        if not tokens.isfinite().all():
            raise CollapseError("latents: not finite; run in fp32 or bf16, and check the checkpoint")
        return self.unpatchify(tokens)

    def compile_sampler(self, **options) -> GenerateMixin:
        """Compile what the diffusion loop repeats; returns the model.

        The numbers of tokens of a step differ, so shapes are dynamic by default; on a GPU `mode="reduce-overhead"` with
        `dynamic=False` records CUDA graphs instead, one for each count of the plan.

        Args:
            options: For `torch.compile`.
        """
        net = self.diffloss.net
        net.from_modulations = torch.compile(type(net).from_modulations.__get__(net), **{"dynamic": True, **options})
        return self

    def _conditions(
        self, tokens: Tensor, known: Tensor, labels: Tensor, count: int, ranks: Tensor | None, guided: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Conditions (B count, D_dec) of the next tokens, with and without label, and where they are (B, count)."""
        batch, visible_count = len(labels), int(known[0].sum())
        # known tokens first, each in its place: a stable sort of a bool
        visible = stable_argsort((~known).to(torch.uint8))[:, :visible_count]
        wanted = None if ranks is None else ranks.masked_fill(known, self.seq_len).argsort(1)[:, :count]
        condition = self.class_condition(labels)
        both = guided or wanted is None
        if both:
            condition = torch.cat([condition, self.fake_latent.expand(batch, -1)])
        twice = (lambda x: torch.cat([x, x])) if both else (lambda x: x)
        encoded = self.forward_encoder(twice(gather_tokens(tokens, visible)), twice(visible), condition)
        z = self.forward_decoder(encoded, twice(visible), None if wanted is None else twice(wanted))
        z, z_uncond = z.chunk(2) if both else (z, None)
        if wanted is None:  # confidence: where the label changes most, it is known best what belongs there
            disagreement = (z - z_uncond).float().square().sum(-1).masked_fill(known, -1.0)
            wanted = disagreement.argsort(1, descending=True)[:, :count]
            z, z_uncond = gather_tokens(z, wanted), gather_tokens(z_uncond, wanted)
        return z.flatten(0, 1), z_uncond.flatten(0, 1) if guided else None, wanted

    def _chooser(self, order) -> GenerationOrder:
        if isinstance(order, GenerationOrder):
            if order.grid != self.grid:
                raise CollapseError(f"order: its grid must be the model's {self.grid}, got {order.grid}")
            return order
        if order is None:
            order = "random" if self.bank is None else "collapse"
        if isinstance(order, str) and order == "confidence" and self.class_emb is None:
            raise CollapseError("order: 'confidence' compares with and without label, and this model has no classes")
        return GenerationOrder(order, self.grid, bank=self.bank if isinstance(order, str) else None)

    def _given(self, latents: Tensor | None, regenerate: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """Which tokens are known (B, L) bool, and the tokens (B, L, token_dim)."""
        device = self.fake_latent.device
        if (latents is None) != (regenerate is None):
            raise CollapseError("regenerate: latents to change and the tokens to regenerate need each other, "
                                f"got {'no latents' if latents is None else 'no mask'}")  # fmt: skip
        if latents is None:
            known = torch.zeros(batch, self.seq_len, dtype=torch.bool, device=device)
            return known, torch.zeros(batch, self.seq_len, self.token_dim, device=device)
        self.check_latents(latents)
        if len(latents) != batch:
            raise CollapseError(f"latents: must be {batch}, one a label, got {len(latents)}")
        if not isinstance(regenerate, Tensor) or regenerate.dtype != torch.bool or (
            tuple(regenerate.shape) not in ((self.seq_len,), (batch, self.seq_len))
        ):  # fmt: skip
            raise CollapseError(
                f"regenerate: must be bool of shape ({self.seq_len},) or ({batch}, {self.seq_len}), "
                f"got {describe(regenerate)}"
            )
        regenerate = regenerate.to(device).expand(batch, -1)
        counts = regenerate.sum(1)
        if counts.min() != counts.max() or counts[0] == 0:
            raise CollapseError(f"regenerate: every row must hold the same number of tokens, at least 1, "
                                f"got {sorted(set(counts.tolist()))}")  # fmt: skip
        tokens = self.patchify(latents.to(device).float())
        return ~regenerate, tokens.masked_fill(regenerate.unsqueeze(-1), 0.0)


def _annealed(diffusion_steps: int | tuple[int, int], steps: int) -> list[int]:
    """Diffusion steps of each iteration."""
    if isinstance(diffusion_steps, (tuple, list)) and len(diffusion_steps) != 2:
        raise CollapseError(f"diffusion_steps: must be one number or two, got {diffusion_steps!r}")
    first, last = (diffusion_steps, diffusion_steps) if isinstance(diffusion_steps, int) else diffusion_steps
    return [round(first + (last - first) * s / max(1, steps - 1)) for s in range(steps)]
