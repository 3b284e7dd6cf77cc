"""How one follows a CUDA path without a GPU: a make-believe device for a CPU build of PyTorch.

Most of what goes wrong on a GPU has nothing to do with numbers. A tensor stayed on the CPU;
offsets are int64 where a kernel reads int32; the host asks for a number, and waits until all
kernels in the queue are done. All of that can be seen from shapes, dtypes and devices alone.

So here "cuda" tensors are PyTorch's own FakeTensors, which have those three and no numbers, and
every operation on them passes one function, `FakeCuda.__torch_dispatch__`:

    stub.cpp    what PyTorch's C++ asks of a GPU before it lets a tensor be called a CUDA tensor:
                a current device, a stream, pinned memory. Each answer is a line that does nothing
    start.py    compiles it, and starts a program with it. (A process of its own is needed: the
                answers have to be there before PyTorch is.)
    device.py   `FakeCuda`: work on the CPU stays real, work on CUDA is followed; what the host
                sends, what it waits for and what it launches is noted, by line of our code
    demands.py  what kernels ask of their arguments and FakeTensors do not check: the assertions
                in the C++ of FlashAttention, of cuBLAS's addmm, of our Triton kernel
    memory.py   which storages are alive, who made them, and how much that is at the peak

What reads a number from the device gets an invented one: see `invented`. What this cannot see:
numbers, races between streams, NCCL, the allocator's fragmentation, time.
"""
