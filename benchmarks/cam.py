"""Grad-CAM's price, in forward passes, beside torchcam, pytorch-grad-cam, captum and a loop over images with two hooks.

    python benchmarks/cam.py [--arch xresnet50] [--bs 8] [--size 224] [--runs 5] [--only NAME ...] [--quick]
                             [--dtype float32] [--out FILE]
    python benchmarks/cam.py --networks [NAME ...] [--batches 1 8] [--runs 5] [--out FILE]

The first form looks at one network in detail. All candidates are run in turns, `--runs` times, and each median is divided
by that of one inference forward. "2 x 4" is two classes at all four stages, eight maps an image. Memory is the peak above
what the loaded model and the batch take, each candidate in a process of its own (on CUDA: what torch allocates). `--quick`
leaves out the candidates above ten forward passes. "floor" is torch without any library: a forward pass and two passes back.

The second form is a table of networks: one map, and 2 x 4, for batches of 1 and 8, beside the fastest of the others, twice.
First at their best: frozen parameters, one object for all layers where the library has that, and autograd's graph started at
the earliest layer by a hook, which none of them does by itself; neither is timed, though dicomcam does both, and puts them back,
inside the time that is shown. Then as they are called by somebody who does none of that (with one object for all layers all the
same). A candidate that takes twice as long as the fastest in the round that warms up is not run again.

Time is that of the CPU, of this process alone, so that others on the machine count little; on CUDA it is the clock's.
Needs captum, torchcam and grad-cam; what is not installed is left out, and the table says so."""
import argparse, json, logging, platform, re, statistics, subprocess, sys, time, warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

warnings.simplefilter('ignore')
logging.disable(logging.WARNING)
import torch

from dicomcam.gradcam import gradcam

CLASSES = [0, 1]

def parsed():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--arch', default='xresnet50')
    p.add_argument('--bs', type=int, default=8)
    p.add_argument('--size', type=int, default=224)
    p.add_argument('--runs', type=int, default=5)
    p.add_argument('--only', nargs='*')
    p.add_argument('--quick', action='store_true')
    p.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'])
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--networks', nargs='*', help='the table of networks, all or those named')
    p.add_argument('--batches', nargs='*', type=int, default=[1, 8])
    p.add_argument('--memory', help=argparse.SUPPRESS)
    p.add_argument('--out')
    return p.parse_args()

class Case:
    "A network, a batch and the layers that are asked for"
    def __init__(self, net, x, names, reshape=None):
        self.net, self.x, self.names, self.reshape = net, x, names, reshape

    @property
    def modules(self): return [self.net.get_submodule(o) for o in self.names]

    def only(self, name): return Case(self.net, self.x, [name], self.reshape)

@contextmanager
def at_best(case):
    "For a library at its best: no gradients of parameters, and a graph that starts at the earliest layer"
    def start(module, inp, out): return out if out.requires_grad else out.detach().requires_grad_().clone()
    case.net.requires_grad_(False)
    hooks = [o.register_forward_hook(start) for o in case.modules]
    try: yield
    finally:
        for o in hooks: o.remove()
        case.net.requires_grad_(True)

# the candidates, each with the classes that it explains

def forward(case):
    with torch.inference_mode(): case.net(case.x)

def ours(case, classes): gradcam(case.net, case.x, classes=classes, layers=case.names)

def autograd_alone(case, classes):
    "What torch itself takes: a forward pass, a pass back a class, and nothing done with the gradients"
    kept = []
    hooks = [o.register_forward_hook(lambda module, inp, out: kept.append(out)) for o in case.modules]
    out = case.net(case.x)
    for o in hooks: o.remove()
    for k in classes: torch.autograd.grad(out[:, k].sum(), kept, retain_graph=k != classes[-1])

def torchcam(case, classes):
    from torchcam.methods import GradCAM
    with GradCAM(case.net, case.modules) as extract:
        out = case.net(case.x)
        for k in classes: extract(k, out, normalized=False, retain_graph=k != classes[-1])

def captum(case, classes):
    "An object takes one layer, a call one class"
    from captum.attr import LayerGradCam
    for layer in case.modules:
        attr = LayerGradCam(case.net, layer)
        for k in classes: attr.attribute(case.x, k)

def pytorch_grad_cam(case, classes):
    "One object for all layers; a forward pass for each class"
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    with GradCAM(model=case.net, target_layers=case.modules, reshape_transform=case.reshape) as cam:
        for k in classes: cam(input_tensor=case.x, targets=[ClassifierOutputTarget(k)]*len(case.x))

def documented(run, case, classes):
    "As a library's README has it: an object for a layer"
    for name in case.names: run(case.only(name), classes)
    case.net.zero_grad(set_to_none=True)

def as_called(run, case, classes):
    "Without anything around it; the parameters' gradients, which nobody asked for, are thrown away"
    run(case, classes)
    case.net.zero_grad(set_to_none=True)

def loop(case, classes):
    "The tutorial's way: an image at a time, two hooks, a class and a layer at a time"
    for i in range(len(case.x)):
        for layer in case.modules:
            for k in classes: one_map(case.net, case.x[i:i+1], layer, k)
    case.net.zero_grad(set_to_none=True)

def one_map(net, x, layer, k):
    kept = {}
    hooks = [layer.register_forward_hook(lambda m, inp, out: kept.update(a=out.detach())),
             layer.register_full_backward_hook(lambda m, gi, go: kept.update(g=go[0].detach()))]
    net(x)[0, k].backward()
    for o in hooks: o.remove()
    return (kept['g'][0].mean((1, 2), keepdim=True)*kept['a'][0]).sum(0)

# how long, and how much

def timed(f, device='cpu'):
    "Seconds: the CPU's, or with CUDA the clock's"
    clock = time.process_time if device == 'cpu' else time.perf_counter
    if device == 'cuda': torch.cuda.synchronize()
    start = clock()
    f()
    if device == 'cuda': torch.cuda.synchronize()
    return clock()-start

def peak(f, device):
    "MB at the peak above what is there before"
    if device == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        return (torch.cuda.max_memory_allocated()-before)/2**20
    def now(key): return int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024
    Path('/proc/self/clear_refs').write_text('5') # the peak so far, of importing torch for one, is forgotten
    before = now('VmRSS')
    f()
    return now('VmHWM') - before

def in_turns(candidates, runs, device, given_up=float('inf')):
    """Seconds of each round of each of `candidates` (name -> (function, what is around it)), and what went wrong with others.

    The first round warms up. Who takes `given_up` times as long as the fastest of his kind in the second is done with."""
    times, gone = {name: [] for name in candidates}, {}
    for round in range(runs+2):
        for name, (f, around) in candidates.items():
            if name in gone: continue
            try:
                with around: seconds = timed(f, device)
            except Exception as e: gone[name] = f'{type(e).__name__}: {str(e).splitlines()[0]}'
            else: times[name].append(seconds)
        if round == 1: gone |= slower(times, gone, given_up)
    return {name: o[2:] for name, o in times.items() if name not in gone}, gone

def slower(times, gone, given_up):
    "Who is out: name -> why. Candidates of a kind have the same second word."
    out = {}
    for kind in {name[1] for name in times}:
        last = {name: o[-1] for name, o in times.items() if name[1] == kind and name not in gone}
        out |= {name: f'{o/min(last.values()):.1f} times the fastest' for name, o in last.items()
            if o > given_up*min(last.values()) and name[0] != 'dicomcam'}
    return out

class Around:
    "A context that can be entered again and again"
    def __init__(self, case=None): self.case = case
    def __enter__(self):
        self.inside = at_best(self.case) if self.case else None
        if self.inside: self.inside.__enter__()
    def __exit__(self, *args):
        if self.inside: self.inside.__exit__(*args)

# a table of networks

def tokens(t):
    "A ViT's tokens as pytorch-grad-cam wants them"
    side = int((t.shape[1]-1)**.5)
    return t[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)

def channels_last(t): return t.permute(0, 3, 1, 2)

def of_torchvision(name):
    import torchvision
    return getattr(torchvision.models.video if name == 'r3d_18' else torchvision.models, name)(num_classes=2)

def of_timm(name):
    import timm
    return timm.create_model(name, num_classes=2)

IMAGE = 3, 224, 224
NETWORKS = { # what makes it, one image, four layers, how others read them
    'resnet18': (of_torchvision, IMAGE, ['layer1', 'layer2', 'layer3', 'layer4'], None),
    'densenet121': (of_torchvision, IMAGE,
        ['features.denseblock1', 'features.denseblock2', 'features.denseblock3', 'features.denseblock4'], None),
    'efficientnet_b0': (of_torchvision, IMAGE, ['features.2', 'features.3', 'features.5', 'features.8'], None),
    'vit_tiny_patch16_224': (of_timm, IMAGE, ['blocks.2', 'blocks.5', 'blocks.8', 'blocks.11.norm1'], tokens),
    'swin_tiny_patch4_window7_224': (of_timm, IMAGE, ['layers.0', 'layers.1', 'layers.2', 'layers.3'], channels_last),
    'r3d_18': (of_torchvision, (3, 8, 64, 64), ['layer1', 'layer2', 'layer3', 'layer4'], None)}

PEERS = dict(torchcam=torchcam, captum=captum, grad_cam=pytorch_grad_cam)

def measured(name, bs, runs, device):
    "A row of the table for one map, and one for 2 x 4"
    make, shape, names, reshape = NETWORKS[name]
    torch.manual_seed(0)
    net = make(name).eval().to(device)
    several = Case(net, torch.randn(bs, *shape, device=device), names, reshape)
    cases = {'1': (several.only(names[-1]), [1]), '2 x 4': (several, CLASSES)}
    candidates = {('forward', ''): (partial(forward, several), Around())}
    for maps, (case, classes) in cases.items():
        candidates['dicomcam', maps] = partial(ours, case, classes), Around()
        candidates |= {(peer, maps): (partial(f, case, classes), Around(case)) for peer, f in PEERS.items()}
        candidates |= {(peer, f'{maps}, as called'): (partial(as_called, f, case, classes), Around()) for peer, f in PEERS.items()}
    times, gone = in_turns(candidates, runs, device, given_up=2)
    return [row(times, gone, maps) | dict(network=name, bs=bs) for maps in cases]

def row(times, gone, maps):
    "Ratios to one inference forward and to the fastest of the others: medians of the rounds' own"
    def ratio(a, b): return round(statistics.median(x/y for x, y in zip(times[a], times[b])), 3)
    base, mine = ('forward', ''), ('dicomcam', maps)
    out = dict(maps=maps, ours=ratio(mine, base))
    for how in maps, f'{maps}, as called':
        peers = {peer: ratio((peer, how), base) for peer in PEERS if (peer, how) in times}
        fastest = min(peers, key=peers.get, default=None)
        out['best' if how == maps else 'called'] = dict(peers=peers, fastest=fastest,
            to_fastest=ratio(mine, (fastest, how)) if fastest else None,
            out={peer: gone[peer, how] for peer in PEERS if (peer, how) in gone})
    return out

def beside(r):
    "The fastest of the others, and how much longer we take"
    return f'{r["fastest"]} {r["peers"][r["fastest"]]:.2f}{r["to_fastest"]:7.3f}' if r['fastest'] else 'none installed'

def networks_table(args):
    setup = dict(device=args.device, runs=args.runs, threads=torch.get_num_threads(), torch=torch.__version__)
    print('  '.join(f'{k} {v}' for k, v in setup.items()))
    print(f'{"in forward passes":30}{"bs":>3}{"maps":>7}{"ours":>8}{"fastest at its best":>24}{"ratio":>7}{"as called":>20}{"ratio":>7}', flush=True)
    rows = []
    for name in args.networks or NETWORKS:
        for bs in args.batches:
            for r in measured(name, bs, args.runs, args.device):
                rows.append(r)
                print(f'{name:30}{bs:3}{r["maps"]:>7}{r["ours"]:8.2f}{beside(r["best"]):>31}{beside(r["called"]):>27}', flush=True)
    return dict(setup=setup, results=rows)

# one network in detail

def xresnet_candidates(args):
    "name -> (what it is, the function, what is around it)"
    from fastai.vision.models import xresnet
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    net = getattr(xresnet, args.arch)(n_out=2).eval().to(args.device, dtype)
    x = torch.randn(args.bs, 3, args.size, args.size).to(args.device, dtype)
    case = Case(net, x, ['4', '5', '6', '7'])
    best, plain = Around(case), Around()
    def of(f, *rest): return partial(f, case, *rest)
    return dict(
        forward=('one inference forward', of(forward), plain),
        ours_1=('dicomcam, last stage, one class', partial(gradcam, net, x, classes=1), plain),
        ours_8=('dicomcam, 2 x 4', of(ours, CLASSES), plain),
        floor=('floor: autograd alone, 2 x 4, at its best', of(autograd_alone, CLASSES), best),
        torchcam_plain=('torchcam, 2 x 4, as documented', of(torchcam, CLASSES), plain),
        torchcam_frozen=('torchcam, 2 x 4, at its best', of(torchcam, CLASSES), best),
        pgc_best=('pytorch-grad-cam, 2 x 4, at its best', of(pytorch_grad_cam, CLASSES), best),
        captum_documented=('captum, 2 x 4', of(captum, CLASSES), plain),
        pgc_documented=('pytorch-grad-cam, 2 x 4, as documented', partial(documented, pytorch_grad_cam, case, CLASSES), plain),
        loop=('hooks, an image at a time, 2 x 4', of(loop, CLASSES), plain))

SLOW = 'captum_documented', 'pgc_documented', 'loop'

def memory(name, f, around, args):
    "MB; on the CPU in a process of its own, which is this script with `--memory`"
    if args.device == 'cuda':
        with around: return round(peak(f, args.device))
    out = subprocess.run([sys.executable, *sys.argv, '--memory', name], capture_output=True, text=True)
    return round(float(out.stdout)) if out.returncode == 0 else None

def asked_for(name, args):
    if name == 'forward': return True
    return (not args.only or name in args.only) and not (args.quick and name in SLOW)

def one_network(args):
    there = xresnet_candidates(args)
    if args.memory:
        _, f, around = there[args.memory]
        with around: print(peak(f, args.device))
        return None
    chosen = {name: o for name, o in there.items() if asked_for(name, args)}
    times, gone = in_turns({name: o[1:] for name, o in chosen.items()}, args.runs, args.device)
    base, rows = statistics.median(times['forward']), {}
    for name, (what, f, around) in chosen.items():
        if name in gone:
            rows[name] = dict(what=what, error=gone[name])
            continue
        seconds = statistics.median(times[name])
        rows[name] = dict(what=what, seconds=round(seconds, 3), forwards=round(seconds/base, 2),
            peak_mb=memory(name, f, around, args))
    device = torch.cuda.get_device_name() if args.device == 'cuda' else f'{platform.machine()}, {torch.get_num_threads()} threads'
    setup = {o: getattr(args, o) for o in ('arch', 'bs', 'size', 'runs', 'dtype')} | dict(device=device, torch=torch.__version__)
    print('  '.join(f'{k} {v}' for k, v in setup.items()))
    for r in rows.values():
        if 'error' in r: print(f'{r["what"]:42}', r['error'])
        else: print(f'{r["what"]:42}{r["seconds"]:8.3f} s {r["forwards"]:7.2f} forwards  {r["peak_mb"]} MB above the model')
    return dict(setup=setup, results=rows)

if __name__ == '__main__':
    args = parsed()
    result = one_network(args) if args.networks is None else networks_table(args)
    if args.out and result: Path(args.out).write_text(json.dumps(result, indent=1))
