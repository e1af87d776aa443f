"""CoMAE, the Collapse Masked Autoencoder: for every patch, how much every other patch is needed to reconstruct it.

Source: Guo et al., "The Collapse of Patches", arXiv 2511.22281. For each target patch n the encoder sees all other
patches and yields weights w_n in [0, 1]; the other patches are noised by as much as their weight is small; the decoder
reconstructs patch n from them. The weights of all targets are the rows of the dependency graph.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .comae_graph import dependency, evidence, expected
from .comae_recipes import Recipe
from .offsets import close, neighbourhood, offset_index, others
from .reconstructor import Reconstruction
from .tokenizer import PixelTokenizer, VaeTokenizer
from .transformer import Transformer, gather_tokens, init_weights


class CoMAE(nn.Module):
    """Encoder of weights, noise injection, decoder of the target patch.

    `recipe="paper"` is the published method. "stable" departs from it where it is ill-posed at small scale: with a
    strong decoder and no price on weights w drifts to 1, with a weak one the mask does not polarise. On
    Tiny-ImageNet-100, same steps and data, its L1 under the own mask is .354 against .476, with 91% against 66% of the
    weights below .1 (docs/results.md, comae_paper; the choices were measured together, not one by one). Each can be
    overridden alone.

    What neither cures: the mask of a target is nearly the same in all images (cosine .999), a local kernel, whose
    PageRank is worse than random for reconstruction. The decoder knows the image: `evidence` asks what its errors owe
    to each patch, and greedy coverage of that graph is well ahead of a spread (docs/results.md, comae).

    Args:
        img_size: Image side in pixels.
        patch_size: Patch side in pixels (without a VAE).
        dim, depth: Encoder width and blocks.
        decoder_dim, decoder_depth: Decoder width and blocks.
        head_dim: Width of an attention head.
        vae: Hub id or folder of a diffusers AutoencoderKL: tokens are its latents. None for pixel patches.
        vae_scale: Factor on the latents; None for the VAE's own.
        recipe: "stable" or "paper"; sets the following arguments where they are None.
        head: "linear": logits of all patches from the class token (paper). "offset": a table over relative offsets plus
            the match of class token and patch token, which learns from every position at once. "attention": the table
            plus the logarithm of what the heads of an attention from class token to patches give on average, which
            speaks from the first step.
        skip: Radius of a linear map from the gated neighbourhood to the reconstruction; 0 for none (paper).
        budget: Factor on the mean weight in the loss; 0 in the paper.
        random_share: Share of decoder steps on random masks; else encoder and decoder co-adapt. 0 in the paper.
        decoder_first: Share of the training in which only the decoder learns, on random masks. 0 in the paper.
        sigma: Width of the noise gate a = exp(-(1 - w)^2 / (2 sigma^2)); the paper does not state it. At .5 a patch of
            weight 0 still leaks a = .135, at .35 a = .017.
        scale: The decoder also tells the scale of a Laplace distribution around its mean, trained by likelihood without
            a say in what is reconstructed: what it expects not to know.
        exclude: Radius of the neighbourhood of the target that encoder and decoder do not see: what does the image tell
            elsewhere?
        contrastive: Factor on the contrastive loss between the masks of one image (paper: .01).
        min_temperature: Floor of the learned temperature of that loss, which else shrinks to satisfy it alone.
    """

    def __init__(
        self,
        img_size: int = 64,
        patch_size: int = 8,
        dim: int = 64,
        depth: int = 3,
        decoder_dim: int = 96,
        decoder_depth: int = 2,
        head_dim: int = 32,
        vae: str | None = None,
        vae_scale: float | None = None,
        recipe: str = "stable",
        head: str | None = None,
        skip: int | None = None,
        budget: float | None = None,
        random_share: float | None = None,
        decoder_first: float | None = None,
        sigma: float | None = None,
        scale: bool | None = None,
        exclude: int | None = None,
        contrastive: float = 0.01,
        min_temperature: float = 0.07,
    ):
        super().__init__()
        given = {"head": head, "skip": skip, "budget": budget, "random_share": random_share, "sigma": sigma,
                 "decoder_first": decoder_first, "scale": scale, "exclude": exclude}  # fmt: skip
        chosen = Recipe.named(recipe, **given)
        self.recipe, self.contrastive, self.min_temperature = recipe, contrastive, min_temperature
        self.has_scale = chosen.scale
        self.head_kind, self.skip, self.sigma, self.exclude = chosen.head, chosen.skip, chosen.sigma, chosen.exclude
        self.budget, self.random_share, self.decoder_first = chosen.budget, chosen.random_share, chosen.decoder_first
        self.tokenizer = VaeTokenizer(vae, vae_scale) if vae else PixelTokenizer(patch_size)
        self.img_size = img_size
        self.grid = self.tokenizer.grid((img_size, img_size))
        h, w = self.grid
        self.num_patches = n = h * w
        token_dim = self.tokenizer.dim

        self.encoder = nn.ModuleDict(
            {
                "embed": nn.Linear(token_dim, dim),
                "query": nn.Embedding(n, dim),  # q_n, also what the class token starts from
                "blocks": Transformer(dim, depth, head_dim, num_prefix_tokens=1),
                "head": nn.Linear(dim, n if self.head_kind == "linear" else dim),
            }
        )
        if self.head_kind != "linear":
            self.encoder["offsets"] = nn.Embedding((2 * h - 1) * (2 * w - 1), 1)
        if self.head_kind == "attention":
            self.encoder["key"] = nn.Linear(dim, dim)
            self.num_heads = dim // min(16, head_dim)
        self.decoder = nn.ModuleDict(
            {
                "embed": nn.Linear(token_dim, decoder_dim),
                "query": nn.Embedding(n, decoder_dim),
                "blocks": Transformer(decoder_dim, decoder_depth, head_dim, num_prefix_tokens=1),
                "mlp": nn.ModuleList(
                    nn.Sequential(nn.LayerNorm(decoder_dim), nn.Linear(decoder_dim, decoder_dim), nn.GELU())
                    for _ in range(4)
                ),
                "head": nn.Linear(decoder_dim, token_dim),
            }
        )
        if self.skip:
            self.decoder["skip"] = nn.Linear(((2 * self.skip + 1) ** 2 - 1) * token_dim, token_dim)
        if self.has_scale:
            self.decoder["scale"] = nn.Sequential(
                nn.Linear(decoder_dim, decoder_dim), nn.GELU(), nn.Linear(decoder_dim, 1)
            )
        self.log_temperature = nn.Parameter(torch.zeros(()))
        init_weights(self)
        nn.init.normal_(self.encoder["query"].weight, std=0.02)
        nn.init.normal_(self.decoder["query"].weight, std=0.02)
        if self.head_kind != "linear":
            nn.init.zeros_(self.encoder["offsets"].weight)
        if self.head_kind == "offset":
            nn.init.zeros_(self.encoder["head"].weight)
        if self.head_kind == "attention":
            for name in ("head", "key"):
                nn.init.trunc_normal_(self.encoder[name].weight, std=dim**-0.5)

    # -- the two halves ------------------------------------------------------------------------------------------------

    def weights(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Weights of all other patches for each target.

        Args:
            tokens: (B, N, D).
            targets: (B, M) long.

        Returns:
            (B, M, N - 1) in [0, 1]: the others in ascending position (`others`).
        """
        position, image = self.logits(tokens, targets)
        weights = 0.5 + 0.5 * torch.tanh((position + image).float())
        if self.exclude:
            weights = weights.masked_fill(close(targets, self.grid, self.exclude), 0.0)
        return weights

    def logits(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts that the weights are made of.

        Args:
            tokens: (B, N, D).
            targets: (B, M) long.

        Returns:
            What the positions say and what the image says, (B, M, N - 1) each; the first is 0 for the head "linear",
            which does not tell them apart.
        """
        b, m = targets.shape
        index = others(targets, self.num_patches).flatten(0, 1)
        x = gather_tokens(self.encoder["embed"](tokens).repeat_interleave(m, 0), index)
        if self.exclude:
            x = x.masked_fill(close(targets, self.grid, self.exclude).flatten(0, 1).unsqueeze(-1), 0.0)
        x = torch.cat([self.encoder["query"](targets).flatten(0, 1).unsqueeze(1).to(x.dtype), x], 1)
        x = self.encoder["blocks"](x, self.grid, index)
        query, seen = self.encoder["head"](x[:, 0]), x[:, 1:]
        if self.head_kind == "linear":
            image = query.gather(1, index)
            return torch.zeros_like(image).view(b, m, -1), image.view(b, m, -1)
        if self.head_kind == "offset":
            # The head starts at 0: the image term starts silent, yet has a gradient
            image = torch.einsum("bd,bnd->bn", query, seen) * x.shape[-1] ** -0.5
        else:
            image = self._attention(query, self.encoder["key"](seen))
        # Adam moves a table entry by about the learning rate a step: scaled, logits of +-2 are some hundred steps away
        position = 8.0 * self.encoder["offsets"](offset_index(targets, index, self.grid)).squeeze(-1)
        return position.view(b, m, -1), image.view(b, m, -1)

    def _attention(self, query: Tensor, keys: Tensor) -> Tensor:
        """Logarithm of the mean attention of the heads, 0 where it is that of an even spread."""
        query = query.unflatten(-1, (self.num_heads, -1))
        keys = keys.unflatten(-1, (self.num_heads, -1))
        match = torch.einsum("bhd,bnhd->bhn", query, keys).float() * query.shape[-1] ** -0.5
        return match.log_softmax(-1).logsumexp(1) + math.log(keys.shape[1] / self.num_heads)

    def decode(self, tokens: Tensor, targets: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
        """`reconstruct`, without the scale: (B, M, D)."""
        return self.reconstruct(tokens, targets, weights, noise).tokens

    def reconstruct(self, tokens: Tensor, targets: Tensor, weights: Tensor, noise: Tensor) -> Reconstruction:
        """Reconstruct the targets from the others, noised as their weights say.

        Args:
            tokens: (B, N, D).
            targets: (B, M).
            weights: (B, M, N - 1) in [0, 1].
            noise: (B, M, N - 1, D) normal.

        Returns:
            tokens (B, M, D); log_scale (B, M), 0 where the model has no scale.
        """
        b, m = targets.shape
        index = others(targets, self.num_patches).flatten(0, 1)
        seen = gather_tokens(tokens.repeat_interleave(m, 0), index)
        gate = torch.exp(-((1 - weights.flatten(0, 1)) ** 2) / (2 * self.sigma**2)).unsqueeze(-1)
        if self.exclude:  # a weight of 0 would still leak a little
            gate = gate.masked_fill(close(targets, self.grid, self.exclude).flatten(0, 1).unsqueeze(-1), 0.0)
        seen = gate * seen + (1 - gate) * noise.flatten(0, 1)
        x = self.decoder["embed"](seen.to(self.decoder["embed"].weight.dtype))
        x = torch.cat([self.decoder["query"](targets).flatten(0, 1).unsqueeze(1).to(x.dtype), x], 1)
        y = self.decoder["blocks"](x, self.grid, index)[:, 0]
        for layer in self.decoder["mlp"]:
            y = y + layer(y)
        log_scale = self.decoder["scale"](y.detach()).float().view(b, m) if self.has_scale else None
        y = self.decoder["head"](y).float()
        if self.skip:
            around = neighbourhood(gate * seen, targets, self.grid, self.skip)
            y = y + self.decoder["skip"](around.to(self.decoder["skip"].weight.dtype)).float()
        return Reconstruction(y.view(b, m, -1), y.new_zeros(b, m) if log_scale is None else log_scale)

    def forward(
        self, images: Tensor, targets: Tensor, noise: Tensor, train_encoder: bool = True, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Training loss L = L_r + contrastive L_c + budget mean(w).

        Args:
            images: (B, C, H, W), normalised as the tokenizer wants them.
            targets: (B, M): the patches to reconstruct, distinct in each image.
            noise: (B, M, N - 1, D) normal.
            train_encoder: False: a decoder step, the encoder gets no gradient.
            mask: (B, M, N - 1) in [0, 1]: weights to use instead of the encoder's (random masks for the decoder).

        Returns:
            loss; l1, mean over features; contrastive; weight, the mean; entropy, H_mask (a target's sum of -w log w).
        """
        tokens = self.tokenizer(images)
        if mask is None:
            with torch.set_grad_enabled(train_encoder and torch.is_grad_enabled()):
                weights = self.weights(tokens, targets)
        else:
            weights = mask
        found = self.reconstruct(tokens, targets, weights, noise)
        errors = (found.tokens - gather_tokens(tokens, targets)).abs()
        l1 = errors.mean()
        contrastive = self.contrastive_loss(weights, targets)
        entropy = -(weights * weights.clamp_min(1e-12).log()).sum(-1).mean()
        loss = l1
        if mask is None and train_encoder:
            loss = l1 + self.contrastive * contrastive + self.budget * weights.mean()
        parts = {"l1": l1, "contrastive": contrastive, "weight": weights.mean(), "entropy": entropy}
        if self.has_scale:
            parts["nll"] = (errors.detach().mean(-1) * (-found.log_scale).exp() + found.log_scale).mean()
            loss = loss + 0.1 * parts["nll"]
        return {"loss": loss, **{key: value.detach() for key, value in parts.items()}}

    def contrastive_loss(self, weights: Tensor, targets: Tensor) -> Tensor:
        """L_c of the paper: InfoNCE between the masks of one image, (B, M, N - 1) and (B, M) -> scalar."""
        n = self.num_patches
        full = weights.new_zeros(*targets.shape, n).scatter(2, others(targets, n), weights)
        full = F.normalize(full, dim=-1)
        logits = full @ full.mT / self.log_temperature.exp().clamp_min(self.min_temperature)
        return -logits.log_softmax(-1).diagonal(dim1=1, dim2=2).mean()

    # -- the graph -----------------------------------------------------------------------------------------------------

    def dependency(self, images: Tensor, max_tokens: int = 2**18, precision: torch.dtype | None = None) -> Tensor:
        """Dependency graph of each image as published, one encoder pass a patch.

        Args:
            images: (B, C, S, S), S = img_size, normalised.
            max_tokens: Tokens in one encoder pass: bounds the memory.
            precision: Of the matrix products; None for bfloat16 on a GPU and the weights' own elsewhere.

        Returns:
            (B, N, N) float32: A[i, j] = weight of patch j for patch i, 0 on the diagonal.
        """
        return dependency(self, images, max_tokens, precision)

    def evidence(self, images: Tensor, max_tokens: int = 2**15) -> tuple[Tensor, Tensor]:
        """What the decoder's errors say: who tells how much of whom, and how much there is to know.

        The weights are asked what they are worth in this very image. Target i has an error given nothing, d_i, and
        given the others as its weights say, e_i: log(d_i / e_i) nats are told. They are shared among the others j by
        what the error owes to each to first order, -w_ij de_i / dw_ij (where that is positive): one pass forth and
        back through the decoder a patch. Without the others a patch tells more than beside them: twice its share.

        Args:
            images: (B, C, S, S), S = img_size, normalised.
            max_tokens: Tokens in one pass: bounds the memory.

        Returns:
            graph (B, N, N) float32 in [0, 1): A[i, j] = share of what is unknown of patch i that patch j alone removes,
            0 on the diagonal; unknown (B, N) > 0: d, the paper's beta.
        """
        return evidence(self, images, max_tokens)

    def expected(self, images: Tensor, max_tokens: int = 2**15) -> Tensor:
        """What the decoder expects not to know of each patch, given the others as its weights say.

        Args:
            images: (B, C, S, S), S = img_size, normalised.
            max_tokens: Tokens in one pass: bounds the memory.

        Returns:
            (B, N) float32 > 0: the scale of the Laplace distribution, the expected L1 error.

        Raises:
            CollapseError: The model was built without `scale`.
        """
        return expected(self, images, max_tokens)
