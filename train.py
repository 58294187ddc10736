"""Distil a guided teacher, two UNet calls a step, into a LoRA student that needs one.

  python train.py                                                 the model that ships here, in minutes on a laptop
  python train.py --model FOLDER --guidance 7.5 --dtype bfloat16  your own Stable Diffusion 1.x, 2.x or XL, on a GPU

Teacher and student are one network: the student is the teacher with its LoRA switched on.
"""

import argparse
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from minidistill import kernels, load
from minidistill.data.examples import batch_to_device
from minidistill.data.shards import teacher_fingerprint
from minidistill.distill import Batch, guided_target, stored_target
from minidistill.evaluate.run_report import write_preview, write_report
from minidistill.training import command_line as cli
from minidistill.training.bookkeeping import Progress
from minidistill.training.cuda_graph import UpdateGraph, adamw, can_record
from minidistill.training.distributed import Ranks, process_group
from minidistill.training.run_folder import checkpoint_files, fixed_settings, lock, resume
from minidistill.training.sources import SOURCES
from minidistill.training.students import METHODS, STUDENTS, choose_method, choose_steps, header, prepare_teacher


def main(args: argparse.Namespace, ranks: Ranks, resources: ExitStack) -> None:
    name = cli.model_name(args.model)
    out = args.out or Path("runs") / name
    results = [out / "lora.safetensors", out / "student", out / "student.safetensors"]
    if any(path.exists() for path in [*checkpoint_files(out), *results]) and not args.resume:
        raise ValueError(f"{out} already holds a run: add --resume to continue it, or name another --out.")
    ranks.share(args.batch)  # raises for a batch that the processes cannot share

    # With --student lora there is one network: W alone is the teacher; W with its LoRA switched on is the student.
    sd = load(args.model, **cli.load_options(args))
    cli.prepare(sd.device, args.compile)
    style = prepare_teacher(sd, args.teacher_lora)
    source, student = SOURCES[args.source](args), STUDENTS[args.student]
    torch.manual_seed(args.seed)
    sd.unet = unet = student.make(sd.unet, args)
    kernels.install(unet, args.kernel)
    trained = [p for p in unet.parameters() if p.requires_grad]
    for network in (sd.text_encoder, sd.vae):
        network.to("cpu")  # they move to the device when they are used
    cli.check_interval(args.interval, sd.schedule.timesteps(args.sample_steps, args.spacing))
    args.negative_prompt = sd.stated_negative(args.negative_prompt)
    uncond = sd.encode_negative(args.negative_prompt)
    if ranks.first:
        resources.enter_context(lock(out))
    ranks.wait()
    print(describe(name, args, sd.unet, trained))

    # Adam's steps are about equally large for every weight, so a layer's output changes more the wider its input.
    peak = args.lr or student.learning_rate / sd.unet_config.widths[0]
    optimizer = adamw(trained, peak)
    weights = teacher_fingerprint(sd)
    recorded = fixed_settings(args, sd, weights, style, source.stamp)
    losses = resume(out, trained, optimizer, recorded)  # empty in a new run
    result = student.result(out, args)
    if any(path.exists() for path in results) and not losses and (args.student == "full" or not checkpoint_files(out)):
        raise ValueError(f"{out} holds a result, and no checkpoint to continue from: name another --out.")
    complete = result.exists() and len(losses) == args.steps  # only the report is missing
    ranks.broadcast([p.data for p in trained])  # GPUs of two kinds may draw different random numbers

    # The teacher samples its trajectories, or your images are encoded; both are kept in a folder that runs may share.
    folder = args.states or out / "states"
    with lock(folder, wait=True) if ranks.first else nullcontext():
        ranks.wait()
        examples = source.prepare(sd, folder, weights, ranks)
    ranks.share(min(args.batch, len(examples)))  # raises for fewer examples than processes
    ask_teacher = guided_target(uncond, args.guidance, args.interval, args.batched_teacher)
    target_of = ask_teacher if source.asks_teacher else stored_target

    if args.compile:  # a graph for each way of calling it; sampling uses sd.unet, which is not compiled
        unet = torch.compile(unet, fullgraph=True, dynamic=False)

    def teach(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Teach the student one batch; returns the loss, the gradient's norm, and the target for a later check."""
        batch_loss, targets = 0.0, []
        for part in batch.split(args.accumulate):
            target = target_of(partial(unet, lora_enabled=False), part)  # stored, or two calls of W now
            eps = unet(part.z_t, part.t, part.cond, lora_enabled=True)  # W and the LoRA, called once
            loss = (part.weight * (eps - target).square()).mean() * (len(part) / len(batch))
            loss.backward()
            batch_loss += loss.detach()
            targets.append(target)
        batch_loss = ranks.average_gradients(trained, batch_loss)
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return batch_loss, norm, torch.cat(targets)

    update = UpdateGraph(teach, can_record(args, ranks, source, sd.device))  # recorded and replayed on one GPU
    sampling = sampling_options(args)
    progress = Progress(
        out, losses, sd.unet, trained, optimizer, recorded, ranks, parts=args.accumulate, total=args.steps, peak=peak,
        # With few steps, the way from any state to the next may be guided.
        interval=None if args.student_steps else args.interval, save_every=args.save_every, before_saving=update.forget,
        preview=None if args.no_report else partial(write_preview, sd, out, source.held_out, **sampling),
    )  # fmt: skip
    with closing(progress.steps()) as steps:  # restores the normal Ctrl-C, even after an error
        for step in steps:  # sets the learning rate
            batch = batch_to_device(ranks.part(examples.batch(step)), sd.device)
            loss, norm, target = update(batch)
            progress.remember(batch, target)
            progress.after_update(step, loss, norm)

    if not ranks.first:
        return
    if sd.device.type == "cuda":
        print(f"Peak GPU memory in tensors: {torch.cuda.max_memory_allocated(sd.device) / 1e9:.2f} GB.")
    if not complete:
        student.save(sd, result, args, header(args, name, sd.schedule.prediction) | style)
        print(f"Wrote {result}")
    if not args.no_report:
        write_report(sd, out, source.held_out, losses, **sampling)


def sampling_options(args: argparse.Namespace) -> dict:
    """How teacher and student sample the images that are shown."""
    return dict(
        steps=args.sample_steps, guidance=args.guidance, negative_prompt=args.negative_prompt, interval=args.interval,
        batch=args.sample_batch or args.batch, student_steps=args.student_steps,
    )  # fmt: skip


def describe(name: str, args: argparse.Namespace, unet: nn.Module, trained: list[nn.Parameter]) -> str:
    """What is frozen, what learns, and where the memory goes."""
    every, learning = (sum(p.numel() for p in ps) for ps in (unet.parameters(), trained))
    dtype, stored = str(trained[0].dtype).removeprefix("torch."), args.weights or args.dtype
    kept = {"normal": "all activations", "low": "only activations that are expensive to compute again"}[args.memory]
    return (
        f"{name}: {every - learning:,} frozen parameters, {learning:,} to train.\nMemory {args.memory}: W in {stored}, "
        f"what learns in {dtype}; {kept} kept for the backward pass; text encoder and VAE on the CPU until used."
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises ValueError for flags that contradict each other."""
    parser = cli.new_parser(__doc__)
    cli.add_model_flags(parser, dtypes=("float32", "bfloat16", "float64"))
    n, x = dict(type=cli.positive_int, metavar="N"), dict(type=cli.positive, metavar="X")
    path, folder = dict(type=Path, metavar="PATH"), dict(type=cli.out_folder, metavar="PATH")
    # fmt: off
    add = parser.add_argument_group("the teacher, two UNet calls a step, samples images").add_argument
    add("--prompts", **path, help="text file, one prompt per line (default: those shipped with the model, else "
        "the built-in ones)")
    add("--images", **path, help="folder of images with captions, in metadata.jsonl or in a .txt beside each: learn "
        "from these, noised, instead of images that the teacher samples")
    add("--guidance", **x, default=cli.DEFAULT_GUIDANCE, help="guidance scale; 7.5 for large models (default: "
        f"{cli.DEFAULT_GUIDANCE:g})")
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from (default: none)")
    add("--interval", type=cli.finite, nargs=2, metavar=("LOW", "HIGH"), help="guide only at time steps t "
        "from LOW to HIGH, with one UNet call elsewhere (default: guide at every step)")
    add("--teacher-lora", type=cli.ScaledFile.parse, metavar="FILE[:SCALE]", help="a style for the "
        "teacher: a LoRA file that has not learned guidance, merged into W")
    add("--sample-steps", **n, help="DDIM steps from noise to image (default: 25; with --student-steps about 24)")
    add("--stride", **n, help="use every N-th DDIM step, for more images per minute (default: 3; less for "
        "few --sample-steps, and 1 with --student-steps)")
    add("--sample-batch", **n, help="images sampled at once (default: as many as --batch)")
    add("--trajectories", **n, help="images the teacher samples; the student learns from the states on the way "
        "(default: 240; 480 with --student-steps or --source noised)")
    add = parser.add_argument_group("the student, one UNet call a step, learns from them").add_argument
    add("--student", choices=STUDENTS, help="what learns: a LoRA, or a full copy of the UNet (default: lora)")
    add("--source", choices=SOURCES, help="learn from the teacher's trajectories, or from its images or --images, "
        "noised afresh with the teacher in the loop (default: trajectories; with --images: images)")
    add("--student-steps", **n, help="teach the student to sample in N steps, from trajectories of --sample-steps; the "
        "LoRA file says so, and sample.py follows it (default: as many as the teacher)")
    add("--method", choices=METHODS, help="short for --student and --source; trajectories, noised: a LoRA from them; "
        "full: a full copy from trajectories")
    add("--rank", **n, default=16, help="rank of the LoRA (default: %(default)s)")
    add("--targets", nargs="+", metavar="TEXT", help="patterns for the names of layers that get a LoRA, for example "
        "'*.attn?.to_*' (default: every linear layer and convolution of attention and residual blocks)")
    add("--alpha", **x, help="the LoRA is scaled by alpha / rank (default: the rank)")
    add("--steps", **n, default=300, help="updates of the student (default: %(default)s)")
    add("--batch", **n, default=16, help="global batch size, split evenly across processes (default: %(default)s)")
    add("--lr", **x, help="peak learning rate (default: 0.128 / the UNet's first width; for a full copy 0.0064 / that)")
    add("--weighting", default="even", choices=("even", "min-snr"), help="weight of the squared error at each time "
        "step: the same everywhere, or min-SNR-5 (default: %(default)s)")
    add("--accumulate", **n, default=1, help="compute a batch in N parts, in less memory (default: %(default)s)")
    add("--memory", default="normal", choices=("low", "normal"), help="low: recompute cheap activations in the "
        "backward pass instead of keeping them (default: %(default)s)")
    add("--batched-teacher", action="store_true", help="in the loop, guide by one call on a batch of twice the size")
    add("--compile", action="store_true", help="compile the UNet for the loop: minutes at first, then faster")
    add("--no-graph", action="store_true", help="launch the operations of an update from Python, without a CUDA graph")
    add("--kernel", default="auto", choices=("auto", "fused", "torch"), help="compute LoRA layers with one CUDA kernel "
        "(on a GPU, in bfloat16) or with PyTorch; auto: with what was measured to be faster (default: %(default)s)")
    add = parser.add_argument_group("the run itself").add_argument
    add("--out", **folder, help="folder of this run (default: runs/<name of the model>)")
    add("--seed", type=cli.seed_number, default=0, metavar="N", help="random seed (default: %(default)s)")
    add("--states", **folder, help="folder of trajectories or encoded images, which runs may share (default: in --out)")
    add("--save-every", **n, default=100, help="updates between checkpoints (default: %(default)s)")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out, if there is one")
    add("--no-report", action="store_true", help="only the student: no evaluation, no images")
    # fmt: on
    args = parser.parse_args(argv)
    if args.guidance == 1:
        raise ValueError("--guidance 1 is no guidance: one UNet call is already enough, so there is nothing to distil.")
    args.interval = cli.read_interval(args.interval)
    choose_method(args)
    choose_steps(args)
    return args


if __name__ == "__main__":
    less_memory = (
        "Try, in this order: --memory low, which takes more time; --accumulate with the number of --batch; "
        "--sample-batch 1; --dtype bfloat16; a smaller --batch; a lower --rank."
    )
    with cli.one_line_errors("train.py", "stopped. Continue with the same command and --resume.", less_memory):
        args = parse()
        with process_group(args.device) as ranks, ExitStack() as resources:
            args.device = ranks.device  # with several processes, each has its own GPU
            main(args, ranks, resources)
