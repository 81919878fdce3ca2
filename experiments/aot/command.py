"""What a compiled program costs on accelerators, counted ahead of time on a machine without one.

    python -m experiments bench --aot v5e:2x4 --program layer      # one synchronized layer, 8 TPU chips; a minute
    python -m experiments bench --aot h100:8 --program chain       # convolution, norm, relu, six times, 8 GPUs
    python -m experiments bench --aot v5e:2x2 --program loop       # what a loop over layers keeps
    python -m experiments bench --aot v5e:16x16 --program resnet50 # a train step, 256 chips; minutes an arm
    python -m experiments bench --aot v5e:16x16                    # all four, the cheap ones first

prints for jaxbn, for Flax's BatchNorm and without normalization what one device sends, reads, writes and keeps; with
`--json FILE` the figures are kept too. TPUs need the package libtpu, GPUs ("h100:8", "h200:8") JAX's CUDA plugin: `pip
install 'jax[cuda12]'`; neither needs a device. On a GPU convolutions are cuDNN's and no kernel is chosen by timing it.
"""

from pathlib import Path

from experiments.aot import record as aot_record
from experiments.aot.cost import cost_of
from experiments.aot.listing import PROGRAMS
from experiments.aot.record import Counted, Entry
from experiments.aot.targets import mesh_of
from experiments.errors import UserError
from experiments.framework.provenance import provenance


def main(topology: str, program: str = "all", path: Path | None = None) -> None:
    """Compile for a topology, such as "v5e:16x16" or "h100:8", and print one line for each norm.

    Args:
      topology: what to compile for.
      program: one of PROGRAMS, or "all".
      path: a record to which the figures are added; None keeps none.
    """
    if program != "all" and program not in PROGRAMS:
        raise UserError(f"--program {program!r} is none of {', '.join(PROGRAMS)}, all")
    entries = [] if path is None else aot_record.open_record(path)
    mesh = mesh_of(topology)
    for name in PROGRAMS if program == "all" else [program]:
        title, unit, lines = PROGRAMS[name](mesh)
        entry = Entry(topology, name, title, mesh.size, unit, provenance(), [])
        print(aot_record.heading(entry))
        for line in lines:
            entry.counted.append(Counted(line.norm, cost_of(line.compiled())))
            print(aot_record.line(entry, entry.counted[-1]), flush=True)
            if path is not None:
                entries = aot_record.added(entries, entry)
                aot_record.write(path, entries)
