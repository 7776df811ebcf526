"""GPUs that are not there: what only runs on a GPU, run and counted without one.

    python -m benchmarks.gpu_accounting                     every family at full size, counted
    FAKE_GPUS=8 PYTHONPATH=benchmarks/fake_gpu/shim python train.py --compile False …
                                                            a run on eight of them

`stub.cpp` gives a torch that is built for CPUs devices named cuda:0 … cuda:7, whose memory is the
host's and whose kernels are the CPU's. `shim/` puts it into every process of a run (by the
environment variables above; `library.environment` makes them), `device.py` lets torch.cuda speak of
it. Results are the CPU's, up to rounding.

`account.py` needs no memory and no time for kernels: its tensors on devices have shapes and no
numbers, so that models of billions of weights go through the real functions; it counts what they
launch, copy, wait for and allocate.

Needed: g++, and a torch built without CUDA. Where either is missing, `library.environment` raises
`Unavailable`, and tests are skipped with its sentence: on a machine with GPUs the real ones are
tested (`pytest -m gpu`). What these devices cannot show: speed, and what goes wrong where work on
streams overlaps, for here everything is done at once and in order.
"""
