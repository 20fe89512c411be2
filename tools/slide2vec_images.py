"""What slide2vec 7.1.4 writes for ready images and regions, for benchmarks/images_714.py, which runs this in
an environment that has it (and none of ours):

    python tools/slide2vec_images.py JOB.json

JOB names a preset, a network (architecture and arguments of timm, or a configuration of transformers), a file
of its weights, and calls. With "make": true the weights are made here, at random. Nothing is loaded from the
hub.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import timm
import torch
import transformers
from slide2vec.encoders.registry import encoder_registry

from slide2vec import api

#: Of the keys of the network in a checkpoint that has others, too.
PREFIXES = {"isight": "patch_encoder.", "mettle": "backbone."}


def network(job: dict[str, Any], dynamic: bool) -> torch.nn.Module:
    """The network of a job, with random weights."""
    torch.manual_seed(0)
    if "timm" in job:
        kwargs = {**job["kwargs"], "pretrained": False}
        for key in ("mlp_layer", "act_layer"):
            if key in kwargs:
                kwargs[key] = {"SwiGLUPacked": timm.layers.SwiGLUPacked, "SiLU": torch.nn.SiLU}[kwargs[key]]
        if dynamic:
            kwargs["dynamic_img_size"] = True
        made = timm.create_model(job["timm"], **kwargs)
        made.pretrained_cfg = {**made.pretrained_cfg, **job["data"]}
        return made.eval()
    kind = getattr(transformers, job["transformers"])
    return kind(getattr(transformers, job["config"])(**job["kwargs"])).eval()


def resample_as_published(made: torch.nn.Module) -> None:
    """Have a stand-in resample its position embeddings as the code of DINO, and of transformers 4.35 to 4.44,
    does: bicubic by a scale of the side plus 0.1."""

    def resampled(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        side = round((table.shape[1] - 1) ** 0.5)
        if grid == (side, side):
            return table
        patches = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = tuple((length + 0.1) / side for length in grid)
        patches = torch.nn.functional.interpolate(patches, scale_factor=scale, mode="bicubic")
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    for module in made.modules():
        if hasattr(module, "interpolate_pos_encoding"):
            module.interpolate_pos_encoding = (  # type: ignore[assignment]
                lambda embeddings, height, width, module=module: resampled(
                    module.position_embeddings,
                    (height // module.config.patch_size, width // module.config.patch_size),
                )
            )
    if hasattr(made, "_pos_embed"):

        def embed(patches: torch.Tensor) -> torch.Tensor:
            trunk: Any = made
            table = resampled(trunk.pos_embed, (patches.shape[1], patches.shape[2]))
            first = trunk.cls_token.expand(len(patches), -1, -1)
            return torch.cat([first, patches.flatten(1, 2)], dim=1) + table

        made._pos_embed = embed  # type: ignore[assignment]


def loaded(job: dict[str, Any], dynamic: bool) -> torch.nn.Module:
    """The same with the weights of the job."""
    made = network(job, dynamic)
    state = torch.load(job["weights"], weights_only=True)
    if (prefix := PREFIXES.get(job["preset"])) is not None:
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    made.load_state_dict(state, strict=True)
    if job.get("shifted"):
        resample_as_published(made)
    return made


def install(job: dict[str, Any]) -> None:
    """Have the preset's class built around our network instead of one from the hub."""
    kind = encoder_registry.require(job["preset"])

    def init(
        self: Any,
        *,
        output_variant: str | None = None,
        dynamic_img_size: bool | None = None,
        allow_non_recommended_settings: bool = False,
    ) -> None:
        made = loaded(job, bool(dynamic_img_size) or job.get("dynamic", True))
        if job["preset"] in ("virchow", "virchow2", "h0-mini", "h-optimus-0", "h-optimus-1"):
            variants = encoder_registry.info(job["preset"]).get("output_variants") or {}
            self._output_variant = output_variant or job.get("variant") or next(iter(variants), "default")
        if job["preset"].startswith("conch"):
            self._model = types.SimpleNamespace(trunk=made, visual=types.SimpleNamespace(trunk=made))
            self._model.to = lambda _: self._model
            self._model.eval = lambda: self._model
            self._device, self._output_variant, self._transform = torch.device("cpu"), "default", None
        elif job["preset"] == "isight":
            self._clip, self._vision = made, made.vision_model
            state = torch.load(job["weights"], weights_only=True)
            weight, bias = (state[f"visual_token_projection.{name}"] for name in ("weight", "bias"))
            self._projection = torch.nn.Linear(weight.shape[1], weight.shape[0])
            self._projection.load_state_dict({"weight": weight, "bias": bias})
            images = processor(job)
            images.image_processor = images  # as of CLIP's processor, which holds it beside its tokeniser
            module = sys.modules[kind.__module__]
            module.AutoProcessor = types.SimpleNamespace(from_pretrained=lambda _: images)  # type: ignore[attr-defined]
            self._output_variant, self._device = output_variant or "token_mean", torch.device("cpu")
        elif job["preset"] == "mettle":
            self._output_variant = output_variant or "cls_patch_mean"
            self._attach_model(made, output_variant="default")
            self._output_variant = output_variant or "cls_patch_mean"
            self._head = mettle_head()
            state = torch.load(job["weights"], weights_only=True)
            self._head.load_state_dict(
                {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
            )
        elif job["preset"] == "dinov3-vitb16":
            self._attach_model(made, output_variant="default")
            self._output_variant = output_variant or "patch_mean"
        elif "timm" in job:
            self._attach_model(made, output_variant=output_variant)
        else:
            self._model, self._device = made, torch.device("cpu")
            self._output_variant = output_variant or "default"
            self._processor = processor(job)
            if job["preset"] in ("phaet", "mascaret"):  # what the code of its repository adds: unit length
                made.encode = lambda batch: torch.nn.functional.normalize(
                    made(pixel_values=batch).last_hidden_state[:, 0], dim=-1
                )
                made.config.pixel_mean, made.config.pixel_std = job["data"]["mean"], job["data"]["std"]

    kind.__init__ = init


def mettle_head() -> Any:
    from slide2vec.encoders.models.mettle import MettleRefineHead

    return MettleRefineHead(dim=1536, num_atoms=16, rank=8, hidden_size=256)


def processor(job: dict[str, Any]) -> Any:
    data = job["data"]
    side, common = data["input_size"][1], {"image_mean": data["mean"], "image_std": data["std"]}
    if job["preset"] == "isight":  # saved with a slow one, which transformers 4.57 therefore loads
        return transformers.CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **common
        )
    if job["preset"] == "phikonv2":
        return transformers.BitImageProcessorFast(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, resample=3, **common
        )
    return transformers.ViTImageProcessorFast(size={"height": side, "width": side}, resample=2, **common)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    constants = {"OPENAI_DATASET_MEAN": job["data"]["mean"], "OPENAI_DATASET_STD": job["data"]["std"]}
    sys.modules["conch.open_clip_custom.constants"] = types.SimpleNamespace(**constants)  # type: ignore[assignment]
    sys.modules["conch"] = sys.modules["conch.open_clip_custom"] = types.ModuleType("conch")
    encoder_registry.info(job["preset"])  # discovers the others
    if job.get("make"):
        made = network(job, False)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in made.named_parameters():  # some are initialised with constants
            if parameter.ndim < 2 or "token" in name or "pos" in name:
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        state = made.state_dict()
        state = {f"{PREFIXES.get(job['preset'], '')}{k}": v for k, v in state.items()}
        if job["preset"] == "isight":
            state["visual_token_projection.weight"] = torch.randn(1024, 1024, generator=generator) * 0.03
            state["visual_token_projection.bias"] = torch.randn(1024, generator=generator) * 0.03
        if job["preset"] == "mettle":
            for name, value in mettle_head().state_dict().items():
                state[f"head.{name}"] = torch.randn(value.shape, generator=generator) * 0.02
        torch.save(state, job["weights"])
        return
    install(job)
    model = api.Model.from_preset(
        job["preset"], device="cpu", output_variant=job.get("variant"), allow_non_recommended_settings=True
    )
    for call in job["calls"]:
        execution = api.ExecutionOptions(
            output_dir=Path(call["output"]), precision="fp32", num_gpus=1, num_workers_per_gpu=0, batch_size=2
        )
        try:
            if call["what"] == "images":
                model.embed_images([api.ImageSpec(**each) for each in call["images"]], execution=execution)
            elif call["what"] == "dense images":
                options = api.DenseImageOptions(**call["dense"])
                model.embed_images_dense(
                    [api.ImageSpec(**each) for each in call["images"]], dense=options, execution=execution
                )
            else:
                regions = [api.SlideRegions(**each) for each in call["regions"]]
                model.embed_regions_dense(
                    regions, dense=api.DenseOptions(**call["dense"]), execution=execution
                )
        except (NotImplementedError, ValueError) as error:
            print(f"REFUSED {call['name']}: {type(error).__name__} {str(error)[:160]}")


if __name__ == "__main__":
    main()
