"""What `find_units` costs in time and memory, beside a forward pass, on one CPU core.

    python examples/benchmarks/find_units_cost.py

prints a table. Each measurement runs in a process of its own, in one thread; seconds are those that the processor
worked for it, the least of three; memory is the process's largest resident size.
"""

import argparse
import multiprocessing
import resource
import time

import torch

from lightning_plasticity.units.find import explore

MODELS = [("resnet50", 64), ("vit_base_patch16_224", 224), ("efficientnet_b0", 224), ("convnext_tiny", 224)]


def measure(name: str, image: int, find: bool, results) -> None:
    import timm

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, image, image)
    forwards = []
    with torch.no_grad():
        for _ in range(3):
            start = time.process_time()
            model(x)
            forwards.append(time.process_time() - start)
    seconds, runs, sets = [0.0], 0, 0
    if find:
        seconds = []
        for _ in range(3):
            start = time.process_time()
            found = explore(model, (x,), {}, explain=False)
            seconds.append(time.process_time() - start)
        runs, sets = found.runs, len(found.units)
    results.put((min(forwards), min(seconds), runs, sets, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def in_a_process(*arguments) -> tuple:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(*arguments, results))
    process.start()
    answer = results.get()
    process.join()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="timm names (default: four)")
    options = parser.parse_args()
    models = [(name, 224) for name in options.models] if options.models else MODELS
    print("| model | image | forward, s | find_units, s | runs | sets | memory, MiB: forward | find_units | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, image in models:
        _, _, _, _, plain = in_a_process(name, image, False)
        forward, seconds, runs, sets, memory = in_a_process(name, image, True)
        print(
            f"| {name} | {image} | {forward:.3f} | {seconds:.1f} | {runs} | {sets} | {plain:.0f} | {memory:.0f} "
            f"| {memory / plain:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
