"""What `npt bench … --help` says. Text only: help must not wait for torch."""

from __future__ import annotations

__all__ = ["BENCH", "CHECK", "COMPARE", "KERNELS", "MEMORY", "REPORT", "TRAIN", "TUNE"]

BENCH = """Measure this machine: speed, memory and training against everything one would use instead.

[bold]First steps[/bold]

\b
npt bench kernels --dry-run      what would run and for how long
npt bench kernels --small        every op, shape, mode and provider at small sizes, a minute or two on any machine
npt bench memory                 peak memory; 448 GiB by formula against what is used
npt bench train                  training steps on random weights, no download
npt bench check                  are all kernels right at real sizes on this GPU, the same every run, and how fast
npt bench report                 one HTML page of all results
npt bench compare old.json new.json
npt bench tune                   the fastest tiles for this machine's GPU

Without a GPU everything runs on the CPU, at the real sizes of small models (--small: seconds). Results are JSON, one file
a run, written as they come: Ctrl-C keeps what is finished.
"""

KERNELS = """Time every provider against the others on the same tensors, launch by launch, once it agrees with float64.

Ratios are to `frozen`, the same layer without a delta, with the 10th and 90th percentile. A provider whose numbers are wrong
is named and gets no time; the exit code is then 1.

[bold]Examples[/bold]

\b
npt bench kernels --op mlp --shape 8b --mode forward,local
npt bench kernels --tokens 1,16,64 --rank 64,256 --provider triton,cuda,kconcat
npt bench kernels --part 1/8        (on a GPU: each part a few minutes, --dry-run says how many)
npt bench kernels --small --provider loop,eager

[bold]Names[/bold]

\b
op        mlp, linear, norm
shape     gpt2, smollm2-135m, llama-3.2-1b, llama-3.1-8b, llama-3.1-70b
mode      forward, local, end_to_end, decode
provider  frozen, eager, kconcat, compile, triton, cuda, loop, materialised, peft, liger, triton-mainloop, cuda-mainloop
"""

MEMORY = """Peak memory of a call beyond its inputs and weights, per provider, mode, tokens and rank.

On a CPU every allocation of torch's allocator is counted, inside operators too; on a GPU max_memory_allocated is read. What
does not fit is given by formula and says so. Names as in `npt bench kernels`.

[bold]Examples[/bold]

\b
npt bench memory
npt bench memory --op mlp --mode local --rank 8,64,256,1024 --tokens 2048
"""

TRAIN = """Training steps of the package's own loop on random weights at a model's shape: tokens/s, MFU, memory, time by part.

[bold]Examples[/bold]

\b
npt bench train --dry-run
npt bench train --shape smollm2-135m
npt bench train --shape 8b --mode local --setting resident,streamed
npt bench train --shape 8b --mode local --micro-batch 4       the same step in fewer, larger passes
npt bench train --setting "published form,published loop"

[bold]Names[/bold]

\b
shape      gpt2, smollm2-135m, llama-3.2-1b, llama-3.1-8b
mode       local, end_to_end
setting    resident, streamed, 8bit, 4bit, published form, published loop
converted  all, 4 (the last four layers)
"""

CHECK = """Is every backend right at real sizes on this GPU, the same bit for bit on every run, and how fast.

Every output and gradient against float64: at most twice PyTorch's own error in the same dtype. Then repeats that must be
bitwise equal, then timings of whole ops and of single kernels. Most important first, within --budget seconds; the file is
written after every case. Exit code: 0 all passed, 1 some failed, 2 what ran passed but time ran out before the last
(or the command was wrong). Timings never change it.

A kernel that breaks the device (illegal instruction or address) ends the run after its case, with a line that says so;
with --isolate cases run in another process and the rest goes on, also after a kernel that hangs.

[bold]Examples[/bold]

\b
npt bench check                                    (at most 8 minutes)
npt bench check --backends triton --no-timings --budget 270
npt bench check --only "mlp 70B" --isolate
npt bench check --device cpu --small               (a dry run anywhere; TRITON_INTERPRET=1: Triton too)
"""

REPORT = """One self-contained HTML page of all results: summary, plots, tables that sort. It needs no network.

Figures whose code has changed since they were measured are flagged as stale.

[bold]Examples[/bold]

\b
npt bench report --in npt-bench
npt bench report --in benchmarks/results --png docs/images      (the documents' figures, from the same data)
npt bench report --in benchmarks/results --table docs/benchmarks.md
"""

COMPARE = """What got worse from BEFORE to AFTER, beyond the spread of both. Exit code 1 if anything did.

Each is a file or a folder of `npt bench`. Times are compared as ratios to the floor of their own run, which another clock does
not move. Rows that only BEFORE has are named; with --strict they count.

[bold]Example[/bold]

\b
npt bench compare main.json branch.json --threshold 0.05
"""

TUNE = """Time every candidate tile of the Triton kernels on this GPU and write the fastest to a table.

KERNEL is any of segmented_gemm, gemm_act, gate_up_forward, gate_up_backward, decode, coefficients, value_grads; all by default.
Nothing tunes itself: without a table for your GPU the kernels use tiles that are known to compile well, and this command
replaces them by measured ones. It needs a CUDA GPU that is otherwise idle, and minutes per kernel.

[bold]Examples[/bold]

\b
npt bench tune
npt bench tune coefficients value_grads
npt bench tune gate_up_forward --dtype fp16 --rounds 30
NPT_TUNING_DIR=~/tiles npt bench tune    (written there, and found there by every run with that variable)

A table of another dtype or kernel in the same file is kept.
"""
