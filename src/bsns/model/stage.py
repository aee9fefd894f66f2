"""A stage: one contiguous range of a model's blocks, run by the model library's own layers.

The library's base model is built without weights, everything outside the range is replaced by modules that change
nothing, and only the range's tensors are read. Its own `forward` then does what is peculiar to the family (rotary
tables, per-layer windows), so that no family needs a fork here.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as library_logging

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadRange, CorruptModel, UnsupportedModel
from bsns.model import attention
from bsns.model.attention import KVCache, Ragged, Segment
from bsns.model.configuration import read_config
from bsns.model.failures import failure, is_no_memory
from bsns.model.families import Family, family_of
from bsns.model.linear import can_pack, pack_linears
from bsns.model.memory import give_back_freed
from bsns.model.quantized import quantize_linears
from bsns.model.tensors import TORCH_DTYPES

WARM_ROWS = 128


class Stage:
    """Blocks [start, end) of a model, ready to run batches. Not thread-safe: one caller at a time."""

    def __init__(
        self, path: Path, blocks: BlockRange, *, dtype: str = "bfloat16", device: str = "cpu", quant: str = "none"
    ) -> None:
        """Load the range from a safetensors directory. `quant`: `int8` or `int4` keeps linear layers' weights so.

        Raises BadRange, CorruptModel, NotEnoughMemory, DiskFull, and UnsupportedModel for an architecture that would
        compute something else when it is cut.
        """
        self.blocks = blocks
        self.dtype = TORCH_DTYPES[dtype]
        self.device = torch.device(device)
        config = load_config(path)
        if blocks.end > config.num_hidden_layers:
            raise BadRange(f"blocks {blocks} do not exist: this model has blocks 0:{config.num_hidden_layers}")
        self.hidden_size = int(config.hidden_size)
        family = family_of(config.model_type)
        self._base = load_cut(path, config, AutoModel, blocks, self.dtype, keep_ends=False)
        self._layers_name = family.layers
        self._layers: nn.ModuleList = getattr(self._base, family.layers)
        self._views: dict[BlockRange, LayerView] = {blocks: LayerView(self._layers)}
        self._bypass = bypassed_layers(config, AutoModel, family)
        # of four dimensions, so that the library takes it for finished and builds none; our attention ignores it
        self._mask = torch.zeros(1, 1, 1, 1, device=self.device)
        try:
            self._place(quant)
            self._check()
        except (MemoryError, RuntimeError) as error:  # torch has no class of its own for a CPU's memory
            if not is_no_memory(error):
                raise
            raise failure(error, path) from error

    def _place(self, quant: str) -> None:
        """Bring the weights to where they are computed with, and into what they are computed in."""
        for index in self.blocks:
            _settle(self._layers[index], self.device, self.dtype, quant)
        self._base.to(self.device)
        give_back_freed()

    @torch.inference_mode()
    def run(
        self, hidden_ND: torch.Tensor, segments: Sequence[Segment], blocks: BlockRange | None = None
    ) -> torch.Tensor:
        """One step of all segments through `blocks` (default: the whole range): (N, hidden) in, (N, hidden) out.

        Each segment's keys and values are written to its cache at its position.
        """
        ragged = Ragged(segments)
        setattr(self._base, self._layers_name, self._view(blocks or self.blocks))
        return self._forward(hidden_ND.to(self.device, self.dtype), ragged)

    def _forward(self, hidden_ND: torch.Tensor, ragged: Ragged) -> torch.Tensor:
        positions = torch.tensor(
            [[p for s in ragged.segments for p in range(s.position, s.position + s.end - s.start)]], device=self.device
        )
        output = self._base(
            inputs_embeds=hidden_ND[None],
            attention_mask=self._mask,
            position_ids=positions,
            use_cache=False,
            ragged=ragged,
        )
        output_ND: torch.Tensor = output.last_hidden_state[0]
        return output_ND

    def _view(self, blocks: BlockRange) -> LayerView:
        """The layer list in which only `blocks` compute."""
        view = self._views.get(blocks)
        if view is None:
            if not self.blocks.covers(blocks):
                raise BadRange(f"blocks {blocks} are not within this stage's {self.blocks}")
            view = self._views[blocks] = LayerView(
                layer if index in range(blocks.start, blocks.end) else self._bypass[index]
                for index, layer in enumerate(self._layers)
            )
        return view

    @torch.inference_mode()
    def _check(self) -> None:
        """Raises UnsupportedModel unless the cut model computes exactly its own blocks, with our attention in each."""
        probe = torch.linspace(-1, 1, 2 * self.hidden_size, device=self.device).reshape(2, -1).to(self.dtype)
        segment = Segment(KVCache(2), 0, 0, 2)
        setattr(self._base, self._layers_name, LayerView(self._bypass))
        untouched = self._forward(probe, Ragged([segment]))
        if not torch.equal(untouched, probe):
            raise UnsupportedModel(
                f"{type(self._base).__name__} changes activations outside its blocks and cannot be cut yet"
            )
        ragged = Ragged([segment])
        setattr(self._base, self._layers_name, self._view(self.blocks))
        self._forward(probe, ragged)
        if ragged.calls != len(self.blocks):
            raise UnsupportedModel(
                f"{type(self._base).__name__} ran our attention {ragged.calls} times in {len(self.blocks)} blocks; "
                "it does not use the library's attention interface"
            )


def load_config(path: Path) -> PreTrainedConfig:
    """The model's configuration with our attention chosen. Raises CorruptModel, UnsupportedModel."""
    config = read_config(path)
    config._attn_implementation = attention.NAME
    return config


def load_cut(
    path: Path, config: PreTrainedConfig, auto: Any, blocks: BlockRange | None, dtype: torch.dtype, *, keep_ends: bool
) -> PreTrainedModel:
    """The library's model with weights only for `blocks` (and the ends, if kept).

    `auto` is AutoModel or AutoModelForCausalLM. Raises CorruptModel, UnsupportedModel, NotEnoughMemory, DiskFull.
    """
    family = family_of(config.model_type)
    whole = model_class(config, auto)

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, config, *args, **kwargs)
        _cut(self, family, blocks, keep_ends=keep_ends)

    namespace: dict[str, Any] = {"__init__": __init__, "__module__": whole.__module__}
    if not keep_ends:
        namespace["_tied_weights_keys"] = {}
    cut_class = type(whole.__name__, (whole,), namespace)
    try:
        with quiet_library():
            model, report = cut_class.from_pretrained(  # type: ignore[attr-defined]
                path, config=copy.deepcopy(config), dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except UnsupportedModel:
        raise
    except KeyError as error:
        if error.args == (attention.NAME,):
            raise UnsupportedModel(f"{whole.__name__} does not use the library's attention interface") from error
        raise CorruptModel(f"{path} cannot be loaded: no {error}") from error
    except Exception as error:  # the library raises whatever its readers raise
        raise failure(error, path) from error
    if report["missing_keys"] or report["mismatched_keys"]:
        missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise CorruptModel(f"{path} lacks {len(missing)} tensors of this architecture, first {missing[0]}")
    model.eval()
    return model


def warm_up(path: Path, block: int, *, dtype: str, device: str = "cpu", quant: str = "none") -> None:
    """Load one block, run it and forget it: what is in memory then is what the process takes without blocks.

    Less will not do: torch's code is some 150 MB, of which the system maps what has run. Raises as Stage does.
    """
    stage = Stage(path, BlockRange(block, block + 1), dtype=dtype, device=device, quant=quant)
    rows = torch.zeros(WARM_ROWS, stage.hidden_size, dtype=stage.dtype)
    stage.run(rows, [Segment(KVCache(WARM_ROWS), 0, 0, WARM_ROWS)])
    del stage
    give_back_freed()


def _settle(layer: nn.Module, device: torch.device, dtype: torch.dtype, quant: str) -> None:
    """Bring a layer's weights into what they are computed in, and to where."""
    if quant != "none":
        quantize_linears(layer, quant, device)
    elif can_pack(device, dtype):
        pack_linears(layer)
    if device.type == "cpu":
        let_go_of_file(layer)
    layer.to(device)


def let_go_of_file(module: nn.Module) -> None:
    """Copy what the weights of a CPU's module hold: they are the checkpoint's file itself, mapped.

    Whoever overwrites or cuts the file would change what we compute, or end the process by SIGBUS.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def model_class(config: PreTrainedConfig, auto: Any) -> type[PreTrainedModel]:
    """The library's class for a configuration. Raises UnsupportedModel."""
    mapping = auto._model_mapping
    if type(config) not in mapping:
        raise UnsupportedModel(f"the model library has no decoder for model type {config.model_type!r}")
    kind = mapping[type(config)]
    return kind[0] if isinstance(kind, (list, tuple)) else kind  # type: ignore[no-any-return]


def bypassed_layers(config: PreTrainedConfig, auto: Any, family: Family) -> list[nn.Module]:
    """One weightless stand-in per layer, which returns its input but keeps the layer's plain attributes."""
    with torch.device("meta"):
        model = model_class(config, auto)(copy.deepcopy(config))
    layers = _layers_of(model, family)
    for layer in layers:
        _bypass(layer)
    return list(layers)


def _cut(model: PreTrainedModel, family: Family, blocks: BlockRange | None, *, keep_ends: bool) -> None:
    for index, layer in enumerate(_layers_of(model, family)):
        if blocks is None or index not in range(blocks.start, blocks.end):
            _bypass(layer)
    if keep_ends:
        return
    base = model.base_model
    base.set_input_embeddings(nn.Identity())
    setattr(base, family.final_norm, nn.Identity())
    if family.learned_positions:
        setattr(base, family.learned_positions, NoPositions())


def _layers_of(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    layers = getattr(model.base_model, family.layers, None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(model.base_model, family.final_norm):
        raise UnsupportedModel(
            f"{type(model).__name__} does not keep its blocks in {family.layers!r} and its last norm in "
            f"{family.final_norm!r}; it needs a row in model/families.py"
        )
    return layers


def _bypass(layer: nn.Module) -> None:
    for name, _ in list(layer.named_children()):
        delattr(layer, name)
    for name, _ in list(layer.named_parameters(recurse=False)):
        delattr(layer, name)
    layer.forward = MethodType(_unchanged, layer)


def _unchanged(_: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


class LayerView(nn.ModuleList):
    """A list of layers that is cheap to slice and walk, which the library does anew in every step."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__(layers)
        self._flat = list(super().__iter__())

    def __getitem__(self, index: Any) -> Any:
        return self._flat[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._flat)


class NoPositions(nn.Module):
    """Stands in for a position table on a stage: the client has already added the positions."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=position_ids.device)


_quieting = threading.Lock()
_before: list[tuple[int, bool]] = []


@contextmanager
def quiet_library() -> Any:
    """The library's progress bars and its table of unused tensors are not for our users' screens."""
    with _quieting:  # threads load at once: only the last to finish may restore what the first has found
        _before.append((library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()))
        library_logging.set_verbosity(logging.CRITICAL)
        library_logging.disable_progress_bar()
    try:
        yield
    finally:
        with _quieting:
            level, bars = _before.pop()
            if not _before:
                library_logging.set_verbosity(level)
                if bars:
                    library_logging.enable_progress_bar()
