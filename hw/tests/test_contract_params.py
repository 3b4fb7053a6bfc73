"""Shapes of models and devices: presets, derived widths, and every message of a refusal."""

import dataclasses
import json
import re

import numpy as np
import pytest

from prestage_hw.contract import PRESETS, DeviceConfig, ModelConfig, Rows, preset
from prestage_hw.contract.perceptron import FORMS

MODEL = ModelConfig(name="m", layers=4, experts=8, top_k=2)


def device(**changes):
    return DeviceConfig(**{"model": MODEL, "slots": 8, **changes})


def raises(kind, text):
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


# Shapes from the models' published configuration files.
PUBLISHED = {
    "gpt-oss-20b": (24, 32, 4),
    "gpt-oss-120b": (36, 128, 4),
    "qwen3-30b-a3b": (48, 128, 8),
    "mixtral-8x7b": (32, 8, 2),
    "olmoe-1b-7b": (16, 64, 8),
    "deepseek-v2-lite": (26, 64, 6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_shapes(name):
    model = preset(name)
    assert (model.layers, model.experts, model.top_k) == PUBLISHED[name]
    assert model.name == name


def test_presets_are_the_published_ones_and_tiny():
    assert set(PRESETS) == {*PUBLISHED, "tiny"}


def test_expert_sizes():
    # Mixtral's experts are three 4096 x 14336 matrices in 16 bits.
    assert preset("mixtral-8x7b").expert_bytes == 3 * 4096 * 14336 * 2
    # 4.25 bits a weight are 17 bytes for 32 weights.
    assert preset("gpt-oss-20b").expert_bytes == 3 * 2880 * 2880 * 17 // 32


def test_parts():
    whole = device(expert_bytes=2048)
    assert whole.part_bytes == (2048,) and whole.first_tiles == (0,)
    assert whole.expert_spans(1, 2, bases=(64,)) == ((64 + 10 * 2048, 2048),)
    config = device(expert_bytes=2048, parts=(512, 1024, 512))
    assert config.first_tiles == (0, 1, 3)
    assert config.part_bases(4096) == (4096, 4096 + 32 * 512, 4096 + 32 * 1536)
    assert config.expert_spans(1, 2, bases=(0, 1 << 20, 1 << 21)) == (
        (10 * 512, 512),
        ((1 << 20) + 10 * 1024, 1024),
        ((1 << 21) + 10 * 512, 512),
    )
    assert DeviceConfig.from_fields(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    "parts, kind, text",
    [
        ([512], TypeError, "Parts must be a tuple of sizes in bytes, not [512]"),
        ((512,) * 5, ValueError, "Expert must have at most 4 parts, not 5"),
        (("512",), TypeError, "Size of part 0 in bytes must be an integer, not '512'"),
        (
            (512, 700),
            ValueError,
            "Size of part 1 must be a whole number of 512-byte tiles, not 700 bytes",
        ),
        (
            (512, 512),
            ValueError,
            "Parts must add up to the expert size of 2048 bytes, not to 1024",
        ),
    ],
)
def test_bad_parts(parts, kind, text):
    with raises(kind, text):
        device(expert_bytes=2048, parts=parts)


#: Shapes of experts in rows: sizes of their parts, and the rows of each.
ROWS = {
    "tile of rows": ((1024,), (Rows(128, 4096),)),
    "row of tiles": ((2048,), (Rows(1024, 1040),)),
    "broken rows": ((1536, 1536), (Rows(96, 160), Rows(768, 1024))),
    "in one part": ((512, 1024), (Rows(), Rows(32, 64))),
    "gaps between experts": ((1024,), (Rows(expert_stride=1040),)),
    "experts in turns": ((1536,), (Rows(48, 8 * 48, 48),)),
    "layers in turns": ((1536,), (Rows(48, 32 * 48, 48, 8 * 48),)),
    "columns of one matrix": ((1024, 512), (Rows(64, 208), Rows(32, 64, 0, 16384))),
}


@pytest.mark.parametrize("shape", ROWS)
def test_rows(shape):
    """Bytes gathered from each array, as NumPy strides tell where they are."""
    sizes, rows = ROWS[shape]
    config = device(expert_bytes=sum(sizes), parts=sizes if len(sizes) > 1 else (), rows=rows)
    bases = [48 + sum(config.array_bytes[:part]) for part in range(len(sizes))]
    assert config.part_bases(48) == tuple(bases)
    assert config.memory_bytes == sum(config.array_bytes)
    memory = np.random.default_rng(1).integers(0, 256, 48 + config.memory_bytes, dtype=np.uint8)
    pieces = []
    for size, given, base, taken, end in zip(
        sizes, rows, bases, config.array_bytes, config.array_ends, strict=True
    ):
        row_bytes = given.row_bytes or size
        count = size // row_bytes
        row_stride = given.row_stride or row_bytes
        expert_stride = given.expert_stride or count * row_stride
        layer_stride = given.layer_stride or max(8 * expert_stride, count * row_stride)
        pieces.append(
            np.lib.stride_tricks.as_strided(
                memory[base : base + taken],
                (4, 8, count, row_bytes),
                (layer_stride, expert_stride, row_stride, 1),
            ).reshape(4, 8, size)
        )
        assert end == 3 * layer_stride + 7 * expert_stride + (count - 1) * row_stride + row_bytes
        assert end <= taken
    experts = np.concatenate(pieces, axis=2)
    for layer in range(4):
        for expert in range(8):
            spans = config.expert_spans(layer, expert, bases=bases)
            gathered = np.concatenate([memory[at : at + size] for at, size in spans])
            assert np.array_equal(gathered, experts[layer, expert])
            assert config.expert_address(layer, expert, base=48) == spans[0][0]
            where = [at + n for at, size in spans for n in range(size)]
            assert config.tile_addresses(layer, expert, bases=bases) == tuple(where[::512])
            for at, size in config.expert_spans(layer, expert):
                assert config.expert_at(at) == config.expert_at(at + size - 1) == (layer, expert)
    assert DeviceConfig.from_fields(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_rows_of_a_tile_and_more():
    config = device(expert_bytes=1024, rows=((128, 4096),))
    assert config.rows == (Rows(128, 4096, 0, 0),)
    assert [at for at, _ in config.expert_spans(0, 0)] == [n * 4096 for n in range(8)]
    assert config.tile_addresses(0, 0) == (0, 16384)
    assert config.gathers and not device(expert_bytes=2048, rows=((1024, 2048),)).gathers
    assert not device().gathers


def test_rows_without_gaps_are_none():
    plain = device(expert_bytes=2048, parts=(1024, 1024))
    for rows in (((128, 128), ()), ((128,), (512, 512, 1024, 8192)), (Rows(), Rows())):
        assert plain.replace(rows=rows) == plain


@pytest.mark.parametrize(
    "rows, changes, kind, text",
    [
        ([(64, 128)], {}, TypeError, "Rows must be a tuple of Rows, not [(64, 128)]"),
        ((64, 128), {}, TypeError, "Rows must be a tuple of Rows, not (64, 128)"),
        (((64, 128),) * 2, {}, ValueError, "Rows must be one for each of 1 parts, not 2"),
        (
            ((64, 1, 2, 3, 4),),
            {},
            ValueError,
            "Rows must be at most 4 numbers, not ((64, 1, 2, 3, 4),)",
        ),
        (
            (("64", 128),),
            {},
            TypeError,
            "Row size of part 0 in bytes must be an integer, not '64'",
        ),
        (
            ((-64, 128),),
            {},
            ValueError,
            "Row size of part 0 in bytes must be between 0 and 1099511627776, not -64",
        ),
        (
            ((), (24, 128)),
            {"parts": (1024, 1024)},
            ValueError,
            "Row size of part 1 must be a whole number of 16-byte beats, not 24 bytes",
        ),
        (
            ((64, 120),),
            {},
            ValueError,
            "Row stride of part 0 must be a whole number of 16-byte beats, not 120 bytes",
        ),
        (
            ((96, 128),),
            {},
            ValueError,
            "Part 0 must be a whole number of rows of 96 bytes, not 2048 bytes",
        ),
        (
            ((64, 48),),
            {},
            ValueError,
            "Row stride of part 0 must be at least the row size of 64 bytes, not 48",
        ),
        (
            ((64, 128, 32),),
            {},
            ValueError,
            "Expert stride of part 0 must be at least the row size of 64 bytes, not 32",
        ),
        (
            ((0, 0, 0, 1024),),
            {},
            ValueError,
            "Layer stride of part 0 must be at least the row size of 2048 bytes, not 1024",
        ),
        (
            ((64, 128),),
            {"layer_bytes": (2048, 1024, 512, 512)},
            ValueError,
            "Rows must not be given where the size of experts differs from layer to layer",
        ),
        (
            ((64, 128),),
            {"mover": "host"},
            ValueError,
            "Rows must be () with a host mover, who keeps experts, not"
            " (Rows(row_bytes=64, row_stride=128, expert_stride=0, layer_stride=0),)",
        ),
        (
            ((64, 128),),
            {"address_bits": 17},
            ValueError,
            "Address width must span all rows of all experts (131520 bytes), but is 17 bits",
        ),
    ],
)
def test_bad_rows(rows, changes, kind, text):
    with raises(kind, text):
        device(expert_bytes=2048, rows=rows, **changes)


def test_sizes_of_layers():
    alike = device(expert_bytes=2048)
    assert alike.layer_sizes == (2048,) * 4 and alike.layer_tiles == (4,) * 4
    assert alike.layer_starts == (0, 32, 64, 96, 128) and alike.memory_bytes == 32 * 2048
    assert device(expert_bytes=2048, layer_bytes=(2048,) * 4) == alike
    config = device(expert_bytes=2048, layer_bytes=(1024, 2048, 512, 1536))
    assert config.layer_sizes == config.layer_bytes and config.layer_tiles == (2, 4, 1, 3)
    assert config.layer_starts == (0, 16, 48, 56, 80)
    assert config.memory_bytes == 8 * sum(config.layer_bytes)
    # A slot holds the largest.
    assert (config.tiles, config.expert_beats) == (4, 128)
    # Each expert begins where the one before ends.
    end = 0
    for layer, size in enumerate(config.layer_bytes):
        for expert in range(8):
            assert config.expert_address(layer, expert) == end
            assert config.expert_spans(layer, expert) == ((end, size),)
            assert config.expert_spans(layer, expert, bases=(4096,)) == ((4096 + end, size),)
            assert config.expert_at(end) == config.expert_at(end + size - 1) == (layer, expert)
            end += size
    assert config.expert_address(3, 7, base=64) == 64 + end - 1536
    assert DeviceConfig.from_fields(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert alike.expert_at(3 * 2048 + 5) == (0, 3) and alike.expert_at(31 * 2048) == (3, 7)


@pytest.mark.parametrize(
    "layer_bytes, changes, kind, text",
    [
        (
            [512] * 4,
            {},
            TypeError,
            "Layer sizes must be a tuple in bytes, not [512, 512, 512, 512]",
        ),
        ((512, 2048), {}, ValueError, "Layer sizes must be one for each of 4 layers, not 2"),
        (
            (512, 2048, "512", 512),
            {},
            TypeError,
            "Expert size of layer 2 in bytes must be an integer, not '512'",
        ),
        (
            (512, 2048, 512, 0),
            {},
            ValueError,
            "Expert size of layer 3 in bytes must be between 512 and 16777216, not 0",
        ),
        (
            (512, 700, 512, 2048),
            {},
            ValueError,
            "Expert size of layer 1 must be a whole number of 512-byte tiles, not 700 bytes",
        ),
        (
            (512, 1024, 512, 1024),
            {},
            ValueError,
            "Greatest expert size of a layer must be that of a slot, 2048 bytes, not 1024",
        ),
        (
            (512, 1024, 512, 4096),
            {},
            ValueError,
            "Greatest expert size of a layer must be that of a slot, 2048 bytes, not 4096",
        ),
        (
            (512, 1024, 512, 2048),
            {"parts": (512, 1536)},
            ValueError,
            "Experts must not have parts where their size differs from layer to layer, but have 2",
        ),
    ],
)
def test_bad_sizes_of_layers(layer_bytes, changes, kind, text):
    with raises(kind, text):
        device(expert_bytes=2048, layer_bytes=layer_bytes, **changes)


def test_address_width_spans_the_experts_as_they_are():
    shape = {"expert_bytes": 4096, "address_bits": 16}
    with raises(ValueError, "Address width must span all experts (131072 bytes), but is 16 bits"):
        device(**shape)
    assert device(**shape, layer_bytes=(4096, 1024, 1024, 2048)).memory_bytes == 1 << 16
    with raises(ValueError, "Address width must span all experts (69632 bytes), but is 16 bits"):
        device(**shape, layer_bytes=(4096, 1024, 1536, 2048))


def test_slot_store():
    with raises(ValueError, "Slot store must be one of internal, axi, not 'ddr'"):
        device(slot_store="ddr")
    shape = {"slots": 40, "expert_bytes": 2048, "address_bits": 16}
    assert device(**shape).slot_store == "internal"
    with raises(ValueError, "Address width must span all slots (81920 bytes), but is 16 bits"):
        device(**shape, slot_store="axi")


def test_checksums_are_asked_for_or_not():
    with raises(TypeError, "Checksums must be True or False, not 1"):
        device(checksums=1)


def test_unknown_preset():
    with raises(
        ValueError, f"Model preset must be one of {', '.join(sorted(PRESETS))}, not 'gpt-5'"
    ):
        preset("gpt-5")


@pytest.mark.parametrize(
    "changes, kind, text",
    [
        ({"name": ""}, TypeError, "Model name must be a non-empty string, not ''"),
        ({"name": 3}, TypeError, "Model name must be a non-empty string, not 3"),
        ({"layers": 0}, ValueError, "Layer count must be between 1 and 255, not 0"),
        ({"layers": 256}, ValueError, "Layer count must be between 1 and 255, not 256"),
        ({"layers": 2.0}, TypeError, "Layer count must be an integer, not 2.0"),
        ({"layers": True}, TypeError, "Layer count must be an integer, not True"),
        ({"experts": 1}, ValueError, "Expert count must be between 2 and 1024, not 1"),
        ({"experts": 1025}, ValueError, "Expert count must be between 2 and 1024, not 1025"),
        ({"experts": "8"}, TypeError, "Expert count must be an integer, not '8'"),
        ({"top_k": 0}, ValueError, "Top-k must be between 1 and 16, not 0"),
        ({"top_k": 17}, ValueError, "Top-k must be between 1 and 16, not 17"),
        ({"top_k": None}, TypeError, "Top-k must be an integer, not None"),
        ({"top_k": 9}, ValueError, "Top-k must not exceed the expert count 8, but is 9"),
        (
            {"expert_bytes": -1},
            ValueError,
            f"Expert size in bytes must be between 0 and {1 << 40}, not -1",
        ),
        (
            {"expert_bytes": 1.5},
            TypeError,
            "Expert size in bytes must be an integer, not 1.5",
        ),
    ],
)
def test_model_is_validated(changes, kind, text):
    with raises(kind, text):
        ModelConfig(**{"name": "m", "layers": 4, "experts": 8, "top_k": 2, **changes})


@pytest.mark.parametrize(
    "changes, kind, text",
    [
        ({"model": "tiny"}, TypeError, "Model must be a ModelConfig, not 'tiny'"),
        ({"contexts": 0}, ValueError, "Context count must be between 1 and 8, not 0"),
        ({"contexts": 9}, ValueError, "Context count must be between 1 and 8, not 9"),
        ({"contexts": "1"}, TypeError, "Context count must be an integer, not '1'"),
        ({"slots": 0}, ValueError, "Slot count must be between 1 and 65535, not 0"),
        ({"slots": 65536}, ValueError, "Slot count must be between 1 and 65535, not 65536"),
        ({"slots": 8.0}, TypeError, "Slot count must be an integer, not 8.0"),
        ({"slots": 1}, ValueError, "Slot count must be at least contexts x top-k = 2, not 1"),
        (
            {"slots": 7, "contexts": 4},
            ValueError,
            "Slot count must be at least contexts x top-k = 8, not 7",
        ),
        (
            {"tile_bytes": 256},
            ValueError,
            "Tile size in bytes must be between 512 and 16384, not 256",
        ),
        (
            {"tile_bytes": 32768},
            ValueError,
            "Tile size in bytes must be between 512 and 16384, not 32768",
        ),
        (
            {"tile_bytes": 768},
            ValueError,
            "Tile size in bytes must be a power of two, not 768",
        ),
        ({"tile_bytes": "1k"}, TypeError, "Tile size in bytes must be an integer, not '1k'"),
        (
            {"expert_bytes": 0},
            ValueError,
            f"Expert size in bytes must be between 512 and {1 << 24}, not 0",
        ),
        (
            {"expert_bytes": (1 << 24) + 512},
            ValueError,
            f"Expert size in bytes must be between 512 and {1 << 24}, not {(1 << 24) + 512}",
        ),
        (
            {"expert_bytes": 1000},
            ValueError,
            "Expert size must be a whole number of 512-byte tiles, not 1000 bytes",
        ),
        (
            {"expert_bytes": 512, "tile_bytes": 1024},
            ValueError,
            "Expert size must be a whole number of 1024-byte tiles, not 512 bytes",
        ),
        (
            {"predictor": "oracle"},
            ValueError,
            "Predictor must be one of none, st_moe, perceptron, not 'oracle'",
        ),
        (
            {"predictor": None},
            ValueError,
            "Predictor must be one of none, st_moe, perceptron, not None",
        ),
        ({"successors": -1}, ValueError, "Successor count must be between 0 and 32, not -1"),
        ({"successors": 33}, ValueError, "Successor count must be between 0 and 32, not 33"),
        (
            {"successors": 9},
            ValueError,
            "Successor count must not exceed the expert count 8, but is 9",
        ),
        (
            {"data_bytes": 2},
            ValueError,
            "Memory port width in bytes must be between 4 and 64, not 2",
        ),
        (
            {"data_bytes": 128},
            ValueError,
            "Memory port width in bytes must be between 4 and 64, not 128",
        ),
        (
            {"data_bytes": 12},
            ValueError,
            "Memory port width in bytes must be a power of two, not 12",
        ),
        (
            {"address_bits": 15},
            ValueError,
            "Address width in bits must be between 16 and 64, not 15",
        ),
        (
            {"address_bits": 65},
            ValueError,
            "Address width in bits must be between 16 and 64, not 65",
        ),
        (
            {"address_bits": 16, "expert_bytes": 4096},
            ValueError,
            "Address width must span all experts (131072 bytes), but is 16 bits",
        ),
        ({"mover": "gpu"}, ValueError, "Mover must be one of dma, host, not 'gpu'"),
        (
            {"mover": "host", "tile_bytes": 511, "expert_bytes": 511},
            ValueError,
            "Tile size in bytes must be between 512 and 1073741824, not 511",
        ),
        (
            {"mover": "host", "tile_bytes": 1000, "expert_bytes": 2048},
            ValueError,
            "Expert size must be a whole number of 1000-byte tiles, not 2048 bytes",
        ),
        (
            {"host_writes": 1, "mover": "host"},
            TypeError,
            "Host writes must be True or False, not 1",
        ),
        ({"host_writes": True}, ValueError, "Host writes need the mover 'host', not 'dma'"),
        (
            {"host_writes": True, "mover": "host", "tile_bytes": 1536, "expert_bytes": 1536},
            ValueError,
            "Tile size in bytes must be a power of two, not 1536",
        ),
        (
            {"host_writes": True, "mover": "host", "slot_store": "axi"},
            ValueError,
            "Slot store must be 'internal' with a host mover, who keeps experts, not 'axi'",
        ),
        ({"victim_samples": -1}, ValueError, "Victim sample count must be between 0 and 8, not -1"),
        ({"victim_samples": 9}, ValueError, "Victim sample count must be between 0 and 8, not 9"),
        ({"replicas": 0}, ValueError, "Replica count must be between 1 and 4, not 0"),
        ({"replicas": 3}, ValueError, "Replica count must be a power of two, not 3"),
        ({"replicas": 8}, ValueError, "Replica count must be between 1 and 4, not 8"),
        ({"replicas": True}, TypeError, "Replica count must be an integer, not True"),
        (
            {"replicas": 4, "slots": 10},
            ValueError,
            "Slot count must be a multiple of the replica count 4, not 10",
        ),
        (
            {"replicas": 2, "slots": 2},
            ValueError,
            "Slot count must be at least contexts x top-k + replicas = 4 where experts may have"
            " copies, not 2",
        ),
        ({"inflight": 3}, ValueError, "In-flight table size must be between 4 and 32, not 3"),
        ({"inflight": 33}, ValueError, "In-flight table size must be between 4 and 32, not 33"),
        (
            {"prefetch_inflight": 0},
            ValueError,
            "In-flight prefetch limit must be between 1 and 6, not 0",
        ),
        (
            {"inflight": 4, "prefetch_inflight": 3},
            ValueError,
            "In-flight prefetch limit must be between 1 and 2, not 3",
        ),
        (
            {"outstanding_bursts": 0},
            ValueError,
            "Outstanding burst limit must be between 1 and 16, not 0",
        ),
        (
            {"outstanding_bursts": 17},
            ValueError,
            "Outstanding burst limit must be between 1 and 16, not 17",
        ),
        (
            {"burst_beats": 0},
            ValueError,
            "Burst length in beats must be between 1 and 256, not 0",
        ),
        (
            {"burst_beats": 512},
            ValueError,
            "Burst length in beats must be between 1 and 256, not 512",
        ),
        (
            {"burst_beats": 48},
            ValueError,
            "Burst length in beats must be a power of two, not 48",
        ),
    ],
)
def test_device_is_validated(changes, kind, text):
    with raises(kind, text):
        device(**changes)


def test_derived_sizes():
    config = device(expert_bytes=3072, tile_bytes=1024, data_bytes=16)
    assert (config.tiles, config.tile_beats, config.expert_beats) == (3, 64, 192)


def test_default_successors_do_not_exceed_the_experts():
    assert device().successors == 8
    four = ModelConfig(name="four", layers=2, experts=4, top_k=2)
    assert device(model=four).successors == 4
    assert device(successors=3).successors == 3


def test_candidate_depth():
    assert device().candidate_depth == 64
    wide = ModelConfig(name="wide", layers=2, experts=128, top_k=2)
    assert device(model=wide, slots=16, contexts=3).candidate_depth == 384


def test_bits():
    config = device(slots=9, contexts=3, expert_bytes=2048, address_bits=33, inflight=5)
    expected = {
        "ctx": 2,
        "layer": 2,
        "expert": 3,
        "slot": 4,
        "tile": 2,
        "beat": 7,
        "tag": 3,
        "index": 1,
        "address": 33,
        "data": 128,
    }
    assert {kind: config.bits(kind) for kind in expected} == expected


def test_bits_of_a_single_one_is_one():
    config = DeviceConfig(
        model=ModelConfig(name="m", layers=1, experts=2, top_k=1), slots=1, expert_bytes=512
    )
    kinds = ("ctx", "layer", "slot", "tile", "index")
    assert [config.bits(kind) for kind in kinds] == [1, 1, 1, 1, 1]


def test_unknown_kinds():
    with raises(
        ValueError,
        "Field kind must be one of ctx, layer, expert, slot, tile, beat, tag, index,"
        " lane_beat, channel, axi_id, tile_bytes, copy, address, data, not 'colour'",
    ):
        device().bits("colour")
    with raises(ValueError, "Array kind must be top_k, data_bytes or lanes, not 'experts'"):
        device().count("experts")


def test_expert_address():
    config = device(expert_bytes=1024)
    assert config.expert_address(0, 0) == 0
    assert config.expert_address(3, 7, base=0x1000) == 0x1000 + 31 * 1024


def test_replace_validates_again():
    config = device()
    assert config.replace(slots=12).slots == 12
    assert config.replace(slots=12) != config
    with raises(ValueError, "Slot count must be at least contexts x top-k = 2, not 1"):
        config.replace(slots=1)


@pytest.mark.parametrize("predictor", DeviceConfig.PREDICTORS)
@pytest.mark.parametrize("form", FORMS)
def test_from_fields_undoes_what_json_does(predictor, form):
    config = DeviceConfig(
        model=preset("qwen3-30b-a3b"), slots=64, contexts=3, predictor=predictor, form=form
    )
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    assert DeviceConfig.from_fields(fields) == config
    with pytest.raises(ValueError, match="Context count must be between 1 and 8, not 9"):
        DeviceConfig.from_fields({**fields, "contexts": 9})


def test_lanes():
    config = DeviceConfig(model=preset("qwen3-30b-a3b"), slots=64, predictor="perceptron")
    assert config.count("lanes") == config.predictor_lanes == config.perceptron.lanes
    assert config.bits("lane_beat") == (128 // config.predictor_lanes - 1).bit_length()
