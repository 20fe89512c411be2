"""ExecutionOptions: how a run uses the machine, and what it writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PlainValidator, field_validator, model_validator

from slide2vec.choices import OUTPUT_FORMATS, EngineChoice, Executor, OutputFormat, Precision
from slide2vec.config.frozen import FrozenConfig
from slide2vec.cpus import Budget
from slide2vec.errors import ConfigError
from slide2vec.files import as_path

__all__ = ["ExecutionOptions", "shard_numbers"]

Positive = Annotated[int, Field(gt=0)]


def _writable(given: object) -> Path:
    if str(path := as_path(given)).startswith(("http://", "https://")):
        raise ConfigError(f"{path}: web pages cannot be written to; s3://, gs:// and folders can")
    return path


class ExecutionOptions(FrozenConfig):
    """How a run uses the machine and what it writes.

    Attributes:
        output_dir: where artifacts and previews go; None = nothing is written. May be a URL that fsspec
            opens (s3://bucket/folder, gs://…; by the extra [cloud]): every file is then written locally and
            published by one upload. Credentials and endpoint are the store's own affair
            (AWS_PROFILE, AWS_ENDPOINT_URL, …); a `upath.UPath` brings others.
        output_format: of embedding files.
        batch_size: tiles per forward pass; None = chosen for the encoder and device.
        num_workers: reading threads; None = the job's CPUs (see `slide2vec.cpus`).
        num_preprocessing_workers: slides planned (segmented, tiled) at once; None = the job's CPUs.
        num_gpus: devices to use; None = all, unless the model was given one. Each has a process of its own;
            `embed_slide` shares out the tiles of the slide, everything else whole slides.
        devices: the same by name, and on a CPU: ("cuda:0", "cuda:2"), ("cpu", "cpu").
        executor: "local": the devices of this machine; "ray": the GPUs of a Ray cluster, num_gpus of them or
            all that there are, now or later. On a cluster without GPUs, or with num_gpus=0, a worker on the
            CPUs of each node; with devices=("cpu", "cpu") as many as that. All nodes see the slides, weights
            and output_dir at the same paths, on storage that they share. A GPU of a cluster that the model's
            own machine does not have may need `precision`, which is the preset's on a GPU, fp32 on a CPU.
        ray_address: of the cluster's head, "auto" where one runs on this machine; None = the one that
            RAY_ADDRESS names, else a new one of this machine alone.
        precision: None = the preset's (fp32 on a CPU). "fp8" needs an engine.
        engine: what runs the encoder. "auto": an engine that `slide2vec build-engine` made for it, this
            precision and this machine, else PyTorch; "torch"; or a runtime whose engine has to be there.
        build_engine: with engine="auto": "auto" builds an engine before the first slide where the run then
            ends sooner, the build included, and one device of this process does all of it; "never" leaves
            that to `slide2vec build-engine`.
        torch_compile: use PyTorch's just-in-time compiler, where PyTorch runs it.
        prefetch_factor: batches that may be ready before the encoder needs them, at least.
        persistent_workers: has no effect: readers are threads, started within a millisecond per call.
        save_tile_embeddings, save_slide_embeddings, save_latents: extra artifacts of slide-level
            and patient-level models.
        save_patch_tokens: of tile-level models: also write the patch tokens of every tile, see
            `Model.save_patch_tokens`, once all slides are embedded.
        output_dtype: of the embeddings; None = fp16 for those of tiles where precision="fp16" is asked for
            here and they are computed in it, else fp32.
        stage_dir: folder on a local disk to which the next slides are copied while the present ones are
            embedded, for slides on slow or remote storage; None = slides are read where they are.
        stage_gb: GB (1e9 bytes) that the copies of a process may take there; None = half of what is free when
            it begins. A larger slide is read where it is.
        on_image_mismatch: of `Model.embed_images`, where an earlier embedding of a sample_id is of another
            image: "raise", or "reencode" to replace it.
        encoders_gb: of several encoders over the same slides, GB (1e9 bytes) that those in the memory of one
            device may take. Encoders that do not fit together take turns in groups, each of which reads the
            slides. None = 0.7 of what is free there when a call begins (on a CPU: free to this job).
        scratch_dir: folder on a local disk where decoded tiles wait for groups whose turn comes later; None =
            stage_dir, else the system's folder for temporary files, unless that is in memory.
        scratch_gb: GB (1e9 bytes) that they may take there; None = half of what is free when a run begins. Of
            slides that do not fit, and on a Ray cluster, each group decodes the tiles. 0 = keep none.
        on_bad_slide: "fail" the patient one of whose slides cannot be embedded, or "skip" the slide and
            embed the patient from the others.
        shard: "i/n", i from 1 to n: a Pipeline embeds the i-th of n parts of its slides, balanced by the
            size of their files; the same part in every process that is given the same slides.
    """

    output_dir: Annotated[Path, PlainValidator(_writable)] | None = None
    output_format: Annotated[OutputFormat, PlainValidator(OUTPUT_FORMATS.checked)] = "pt"
    batch_size: Positive | None = None
    num_workers: Positive | None = None
    num_preprocessing_workers: Positive | None = None
    num_gpus: Annotated[int, Field(ge=0)] | None = None
    devices: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    executor: Executor = "local"
    ray_address: str | None = None
    precision: Precision | None = None
    engine: EngineChoice = "auto"
    build_engine: Literal["auto", "never"] = "auto"
    torch_compile: bool = False
    prefetch_factor: Positive = 4
    persistent_workers: bool = True
    save_tile_embeddings: bool = False
    save_slide_embeddings: bool = False
    save_latents: bool = False
    save_patch_tokens: bool = False
    output_dtype: Literal["fp16", "fp32"] | None = None
    on_image_mismatch: Literal["raise", "reencode"] = "raise"
    on_bad_slide: Literal["fail", "skip"] = "fail"
    stage_dir: Path | None = None
    stage_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    encoders_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    scratch_dir: Path | None = None
    scratch_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    shard: str | None = None

    @model_validator(mode="after")
    def _shard_is_of_a_run_on_disk(self) -> Self:
        if self.shard is not None and self.output_dir is None:
            raise ConfigError(
                f"shard={self.shard} is for a Pipeline, whose output_dir is common to all shards: give "
                "output_dir, or leave shard out"
            )
        return self

    @field_validator("shard")
    @classmethod
    def _shard_is_i_of_n(cls, value: str | None) -> str | None:
        return None if value is None else "{}/{}".format(*shard_numbers(value))

    @model_validator(mode="after")
    def _fits_the_executor(self) -> Self:
        if self.executor != "ray" and self.ray_address is not None:
            raise ConfigError(
                f'ray_address={self.ray_address} is for executor="ray"; say so, or leave it out'
            )
        if self.executor == "ray" and any(name != "cpu" for name in self.devices or ()):
            raise ConfigError(
                f'devices={", ".join(self.devices or ())} with executor="ray": say num_gpus=, for Ray '
                'chooses which; only workers on CPUs can be named, ("cpu", "cpu")'
            )
        return self

    def feature_dtype(self, precision: str) -> Literal["float16", "float32"]:
        """Of the embeddings, for a run in `precision`; fp16 is for runs that ask for it, not for presets."""
        asked = self.output_dtype or ("fp16" if self.precision == precision == "fp16" else "fp32")
        return "float16" if asked == "fp16" else "float32"

    @property
    def vector_dtype(self) -> Literal["float16", "float32"]:
        """Of the embeddings of slides and patients on disk."""
        return "float16" if self.output_dtype == "fp16" else "float32"

    def budget(self, device_type: str, gflops: float | None = None) -> Budget:
        """Threads of the stations of a process whose encoder runs on "cpu", "cuda" or "mps".

        Args:
            gflops: the encoder's work per tile; None = a lot.

        Raises:
            ConfigError: the environment variable SLIDE2VEC_CPUS is no positive integer.
        """
        return Budget.of(
            device_type,
            num_workers=self.num_workers,
            num_preprocessing_workers=self.num_preprocessing_workers,
            gflops=gflops,
        )


def shard_numbers(shard: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16).

    Raises:
        ConfigError: it is not i/n with 1 <= i <= n.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard.strip())
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count:
        raise ConfigError(
            f'a shard is "i/n", the i-th of n from 1/n to n/n, got {shard!r}; in a SLURM array that counts '
            "from 0: $((SLURM_ARRAY_TASK_ID + 1))/$SLURM_ARRAY_TASK_COUNT"
        )
    return number, count
