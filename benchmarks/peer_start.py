"""From a process's start to its first tile with slide2vec 7.1.4: run by the Python of an environment with it.

    python peer_start.py SLIDE PRESET WEIGHTS ARCH KWARGS FOLDER

Its `Pipeline` over one slide, with its defaults but no previews, on the CPU in fp32. In place of what it
would fetch from the Hugging Face hub it gets timm's ARCH with KWARGS (JSON) and the weights of a file. Prints
one JSON object like benchmarks.start; nothing of ours is imported.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

FOUND: dict[str, Any] = {}


def note(_module: object, _inputs: object, features: Any) -> None:
    """Called after each forward pass: when the first was done, and tiles and seconds of those after it."""
    now = time.monotonic()
    if not FOUND:
        FOUND.update(first_tile_at=now, first_tile_cpu_s=time.process_time(), later_tiles=0, later_s=0.0)
        return
    FOUND["later_tiles"] += len(features)
    FOUND["later_s"] = now - FOUND["first_tile_at"]


def from_a_file(arch: str, kwargs: dict[str, Any], weights: str) -> None:
    """Have timm build that, whatever it is asked for."""
    import timm
    from safetensors.torch import load_file

    create = timm.create_model

    def made(*_: object, **__: object) -> Any:
        model = create(arch, pretrained=False, **kwargs)
        model.load_state_dict(load_file(weights))
        model.register_forward_hook(note)
        return model

    timm.create_model = made


def main() -> None:
    slide, preset, weights, arch, kwargs, folder = sys.argv[1:]
    from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig

    from_a_file(arch, json.loads(kwargs), weights)
    tiling = PreprocessingConfig()
    without = replace(tiling.preview, save_mask_preview=False, save_tiling_preview=False)
    tiling = replace(tiling, preview=without)
    execution = ExecutionOptions(output_dir=Path(folder), precision="fp32")
    pipeline = Pipeline(Model.from_preset(preset, device="cpu"), tiling, execution=execution)
    result = pipeline.run(slides=[{"sample_id": "slide", "image_path": slide}])
    tiles = sum(artifact.num_tiles for artifact in result.tile_artifacts)
    print(json.dumps({**FOUND, "tiles": tiles, "runs_on": "PyTorch, fp32 on cpu"}))


if __name__ == "__main__":
    main()
