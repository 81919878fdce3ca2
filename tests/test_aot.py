"""Bytes counted from compiled text: programs whose bytes are known by hand, and XLA's own count where nothing loops."""

import importlib.util
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import jaxbn
from experiments.aot import command, listing
from experiments.aot import programs as aot_programs
from experiments.aot import record as aot_record
from experiments.aot import targets as aot_targets
from experiments.aot.collectives import collectives
from experiments.aot.cost import cost_of
from experiments.aot.hlo import arrays, elements, parse
from experiments.aot.hlo_bytes import moves, traffic
from experiments.errors import UserError
from experiments.training import conv_chain

N = 256
MATRIX = 4 * N * N  # bytes
SMALL = 100 * N  # bytes of vectors, counters and scalars, far below one matrix
X = jnp.ones((N, N))

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="an option of the benchmark: pip install libtpu"
)


def text(f, *arguments):
    return jax.jit(f).lower(*arguments).compile().as_text()


def matrices(counted):
    return pytest.approx(counted * MATRIX, abs=SMALL)


def test_an_elementwise_program_reads_its_operands_and_writes_its_result():
    assert traffic(text(lambda a, b: jnp.sin(a) + b, X, X)).normal == 3 * MATRIX


def test_an_operand_used_twice_is_read_once():
    assert traffic(text(lambda a: a * jnp.sin(a), X)).normal == 2 * MATRIX


def test_a_product_of_matrices_reads_two_and_writes_one():
    assert traffic(text(lambda a, b: a @ b, X, X)).normal == 3 * MATRIX


def test_a_counted_loop_counts_every_round():
    steps = 7
    scanned = text(lambda a, b: jax.lax.scan(lambda c, _: (jnp.sin(c @ b), None), a, None, length=steps)[0], X, X)
    # Each round a product (three) and a sine (two); before them a copy of the carry, which is not given away (two).
    assert traffic(scanned).normal == matrices(steps * (3 + 2) + 2)
    assert traffic(scanned).rare == 0


def test_a_loop_that_starts_later_runs_fewer_rounds():
    program = parse(text(lambda a: jax.lax.fori_loop(3, 9, lambda i, c: jnp.sin(c + i), a), X))
    assert [program.rounds(*loop) for loop in program.loops()] == [6]


def test_a_scan_reads_and_writes_slices_only():
    steps = 5
    rows = jnp.ones((steps, N, N))
    scanned = text(lambda b, xs: jax.lax.scan(lambda c, x: (c, jnp.sin(x) + b), 0.0, xs)[1], X, rows)
    # Each round reads its slice and b and writes its slice; the stacked result may be cleared before.
    assert traffic(scanned).normal in (matrices(3 * steps), matrices(4 * steps))


WHILE = """HloModule m
%body (s: (f32[256,256], pred[])) -> (f32[256,256], pred[]) {
  %s = (f32[256,256]{1,0}, pred[]) parameter(0)
  %x = f32[256,256]{1,0} get-tuple-element(%s), index=0
  %go = pred[] get-tuple-element(%s), index=1
  %y = f32[256,256]{1,0} sine(%x)
  ROOT %t = (f32[256,256]{1,0}, pred[]) tuple(%y, %go)
}
%condition (s: (f32[256,256], pred[])) -> pred[] {
  %s = (f32[256,256]{1,0}, pred[]) parameter(0)
  ROOT %go = pred[] get-tuple-element(%s), index=1
}
ENTRY %main (x: f32[256,256], p: pred[]) -> f32[256,256] {
  %x = f32[256,256]{1,0} parameter(0)
  %p = pred[] parameter(1)
  %c = f32[256,256]{1,0} copy(%x)
  %t = (f32[256,256]{1,0}, pred[]) tuple(%c, %p)
  %w = (f32[256,256]{1,0}, pred[]) while(%t), condition=%condition, body=%body
  ROOT %y = f32[256,256]{1,0} get-tuple-element(%w), index=0
}
"""

CONDITIONAL = """HloModule m
%product (s: (f32[256,256], f32[256,256])) -> f32[256,256] {
  %s = (f32[256,256]{1,0}, f32[256,256]{1,0}) parameter(0)
  %a = f32[256,256]{1,0} get-tuple-element(%s), index=0
  %b = f32[256,256]{1,0} get-tuple-element(%s), index=1
  ROOT %y = f32[256,256]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%negative (x: f32[256,256]) -> f32[256,256] {
  %x = f32[256,256]{1,0} parameter(0)
  ROOT %y = f32[256,256]{1,0} negate(%x)
}
ENTRY %main (p: pred[], a: f32[256,256], b: f32[256,256]) -> f32[256,256] {
  %p = pred[] parameter(0)
  %a = f32[256,256]{1,0} parameter(1)
  %b = f32[256,256]{1,0} parameter(2)
  %t = (f32[256,256]{1,0}, f32[256,256]{1,0}) tuple(%a, %b)
  ROOT %y = f32[256,256]{1,0} conditional(%p, %t, %a), true_computation=%product, false_computation=%negative
}
"""


def test_a_loop_that_values_end_is_counted_once_and_apart():
    assert traffic(WHILE)[:2] == (2 * MATRIX, 2 * MATRIX)  # the copy before, the sine within


def test_a_call_names_its_computation_and_not_the_attribute_behind_it():
    called = WHILE.replace("body=%body", 'body=%body, frontend_attributes={xla_cpu_small_call="true"}')
    assert [list(loop.called()) for _, loop in parse(called).loops()] == [["condition", "body"]]


def test_of_branches_the_one_that_moves_most_is_counted():
    assert traffic(CONDITIONAL).normal == 3 * MATRIX


def test_a_slice_and_an_update_in_place_touch_what_they_move():
    hlo = """HloModule m
ENTRY %main (a: f32[64,128], b: f32[8,128], i: s32[]) -> f32[64,128] {
  %a = f32[64,128]{1,0} parameter(0)
  %b = f32[8,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %s = f32[8,128]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={8,128}
  ROOT %u = f32[64,128]{1,0} dynamic-update-slice(%a, %s, %i, %i)
}
"""
    slice_bytes, index = 4 * 8 * 128, 4
    assert traffic(hlo).normal == 4 * slice_bytes + 2 * index


def test_an_asynchronous_copy_counts_where_it_starts_and_what_is_on_the_chip_apart():
    hlo = """HloModule m
ENTRY %main (a: f32[64,128]) -> f32[64,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %c = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %d = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%c)
  ROOT %n = f32[64,128]{1,0:T(8,128)} negate(%d)
}
"""
    counted = traffic(hlo)
    assert (counted.normal, counted.on_chip) == (2 * 4 * 64 * 128, 2 * 4 * 64 * 128)


@pytest.mark.parametrize(
    ("shape", "size", "stored"),
    [
        ("f32[3,5]{1,0}", 60, 60),
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", 12, 2 * 8 * 128),
        ("f32[32,56,64]{0,2,1:T(8,128)}", 4 * 32 * 56 * 64, 4 * 128 * 56 * 64),
        ("pred[]{:T(512)}", 1, 512),
        ("f8e4m3fn[16]{0}", 16, 16),
        ("s4[16]{0}", 8, 8),
    ],
)
def test_bytes_of_an_array_and_of_the_tiles_that_hold_it(shape, size, stored):
    (array,) = arrays(shape)
    assert (array.bytes, array.padded) == (size, stored)


def test_elements_of_a_nested_tuple():
    assert elements("((f32[2,3]{1,0:T(8,128)}, s32[]), /*index=1*/pred[4]{0})") == [
        "(f32[2,3]{1,0:T(8,128)}, s32[])",
        "pred[4]{0}",
    ]


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="as_text"):
        parse("nothing")


def test_the_second_measurement_of_statistics_is_rare_and_a_loop_of_training_steps_is_not():
    norm = jaxbn.batch_norm()
    variables = norm.init(jax.random.key(0), X)

    def step(batch_stats, _):
        return norm.apply({**variables, "batch_stats": batch_stats}, X, train=True)[1], None

    program = parse(text(lambda s: jax.lax.scan(step, s, None, length=3)[0], variables["batch_stats"]))
    rounds = [program.rounds(*loop) for loop in program.loops()]
    assert rounds.count(3) == 1
    assert rounds.count(None) >= 1
    rare = [move for move in moves(text(lambda s: step(s, 0)[0], variables["batch_stats"])) if move.rare]
    assert sum(move.bytes for move in rare) >= 2 * MATRIX  # x's peak, x's sums


def test_a_collective_in_a_counted_loop_is_not_rare():
    def steps(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "data") / 2, None), x, None, length=3)[0]

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(steps, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=False)
    (only,) = collectives(text(spread, jnp.ones((8, 2))))
    assert (only.in_loop, only.rare) == (True, False)


@needs_libtpu
@pytest.mark.parametrize("arm", ["none", "jaxbn, fused", "flax", "flax, exact variance"])
def test_on_a_tpu_the_count_is_xlas_own_where_nothing_is_fetched_ahead(arm):
    """Too large for the memory on the chip: XLA counts the source of an asynchronous copy twice."""
    mesh = aot_targets.mesh_of("v5e:2x2")
    norm = aot_programs.ARMS[arm]("data", jax.nn.relu)
    compiled = aot_programs.compile_layer(norm, mesh, output=True, shape=(64, 56, 56, 256))
    assert sum(traffic(compiled.as_text())) == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=1e-4)


@needs_libtpu
def test_a_synchronized_layer_sends_twice_and_moves_what_flax_moves_and_a_sample_on_a_tpu():
    mesh = aot_targets.mesh_of("v5e:2x2")
    costs = [
        cost_of(aot_programs.compile_layer(aot_programs.ARMS[arm]("data", jax.nn.relu), mesh, output=True))
        for arm in ("jaxbn, fused", "flax")
    ]
    assert [cost.collectives for cost in costs] == [2, 2]
    assert costs[0].moved <= 1.015 * costs[1].moved  # The sample of a sixteenth of x is a hundredth of six passes.


@needs_libtpu
def test_unknown_topologies_and_programs_are_users_errors():
    with pytest.raises(UserError, match="v5e:16x16"):
        aot_targets.mesh_of("v5e:three")
    with pytest.raises(UserError, match="layer, chain, loop, resnet50, all"):
        command.main("v5e:2x2", "mlp")


@pytest.mark.parametrize("topology", ["h100:", "h100:9", "h200:0", "h100:2x4"])
def test_gpus_come_by_the_host(topology):
    with pytest.raises(UserError, match="multiple of 8"):
        aot_targets.mesh_of(topology)


def test_without_the_cuda_plugin_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(aot_targets, "has_cuda_plugin", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'jax\[cuda12\]"):
        aot_targets.mesh_of("h100:8")


@pytest.mark.skipif(
    not aot_targets.has_cuda_plugin(), reason="an option of the benchmark of several GB: pip install 'jax[cuda12]'"
)
def test_one_layer_on_eight_gpus_takes_seven_passes_and_two_collectives():
    """In a process of its own: what the plugin reads of the environment it reads once."""
    program = (
        "import jax; from experiments.aot import cost, listing, programs, targets;"
        "mesh = targets.mesh_of('h100:8'); norm = programs.ARMS['jaxbn, fused']('data', jax.nn.relu);"
        "found = cost.cost_of(programs.compile_layer(norm, mesh, output=True));"
        "print(found.collectives, found.branches, found.moved / listing.size_of(programs.LAYER))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    sent, branches, passes = done.stdout.split()
    # x for its sums; x and dy for theirs; x and dy for y and dx: seven passes; a sixteenth for the sample.
    assert (int(sent), int(branches), float(passes)) == (2, 0, pytest.approx(7, abs=0.1))


MESH_SHAPE = (8, 4, 4, 3)  # of one device


def counted(compiled):
    found = cost_of(compiled)
    assert found.moved > 0
    return found


@pytest.mark.parametrize("arm", ["none", "jaxbn", "flax"])
def test_the_programs_compile_for_the_devices_that_are_here(monkeypatch, arm):
    """Eight devices of a CPU in place of an accelerator's: gradients in one all-reduce, two more for each norm."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    monkeypatch.setattr(aot_programs, "CHAIN_LENGTH", 2)
    norm = aot_programs.ARMS[arm]("data", jax.nn.relu)
    layer = counted(aot_programs.compile_layer(norm, mesh, output=True, shape=MESH_SHAPE))
    chain = counted(aot_programs.compile_chain(norm, mesh, shape=MESH_SHAPE))
    alone = aot_programs.ARMS[arm](None, jax.nn.relu)
    loop = counted(aot_programs.compile_loop(conv_chain.loop(conv_chain.norm_first, True), alone, mesh, MESH_SHAPE))
    assert (layer.collectives > 0, loop.collectives) == (arm != "none", 0)
    assert chain.collectives > 0


@pytest.mark.parametrize("program", listing.PROGRAMS)
def test_every_program_is_listed_with_norms_and_a_unit(program):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    title, unit, lines = listing.PROGRAMS[program](mesh)
    names = [line.norm for line in lines]
    assert title
    assert len(names) == len(set(names)) >= 3
    assert (unit is None) == (program == "resnet50")


def test_what_is_counted_is_printed_and_kept(tmp_path, monkeypatch, capsys):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    line = listing.Line("some norm", partial(jax.jit(jnp.sin).lower(X).compile))
    monkeypatch.setattr(command, "mesh_of", lambda _: mesh)
    monkeypatch.setattr(command, "PROGRAMS", {"layer": lambda _: ("A sine", MATRIX, [line])})
    path = tmp_path / "made" / "aot.json"
    command.main("v5e:2x4", "layer", path)
    assert "A sine, on each of 8 devices (v5e:2x4)" in capsys.readouterr().out
    (entry,) = aot_record.read(path)
    assert entry.counted[0].cost.moved == 2 * MATRIX
