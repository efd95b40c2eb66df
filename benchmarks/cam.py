"""Grad-CAM's price, in forward passes, beside torchcam, pytorch-grad-cam, captum and a loop over images with two hooks.

    python benchmarks/cam.py [--arch xresnet50] [--bs 8] [--size 224] [--runs 5] [--only NAME ...] [--quick] [--dtype float32] [--out FILE]

All candidates are run in turns, `--runs` times, and each median is divided by that of one inference forward. "2 x 4" is
two classes at all four stages, eight maps an image. Memory is the peak above what the loaded model and the batch take, each
candidate in a process of its own (on CUDA: what torch allocates). `--quick` leaves out the candidates above ten forward passes.
Needs captum, torchcam and grad-cam; what is not installed is left out, and the table says so."""
import argparse, functools, json, logging, platform, re, statistics, subprocess, sys, time, warnings
from pathlib import Path

warnings.simplefilter('ignore')
logging.disable(logging.WARNING)
import torch
from fastai.vision.models import xresnet

from dicomcam.gradcam import gradcam

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--arch', default='xresnet50')
p.add_argument('--bs', type=int, default=8)
p.add_argument('--size', type=int, default=224)
p.add_argument('--runs', type=int, default=5)
p.add_argument('--only', nargs='*')
p.add_argument('--quick', action='store_true')
p.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'])
p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
p.add_argument('--memory', help=argparse.SUPPRESS)
p.add_argument('--out')
args = p.parse_args()

torch.manual_seed(0)
dtype, STAGES, CLASSES = getattr(torch, args.dtype), [-8, -7, -6, -5], [0, 1]
net = getattr(xresnet, args.arch)(n_out=2).eval().to(args.device, dtype)
x = torch.randn(args.bs, 3, args.size, args.size).to(args.device, dtype)
layers = [net[i] for i in STAGES]

def frozen(f):
    "For a library at its best: no gradients of parameters; the input asks for them, or the library has no graph"
    @functools.wraps(f)
    def run():
        net.requires_grad_(False)
        try: f(x.clone().requires_grad_())
        finally: net.requires_grad_(True)
    return run

def forward():
    with torch.inference_mode(): net(x)

def ours_1(): gradcam(net, x, classes=1)
def ours_8(): gradcam(net, x, classes=CLASSES, layers=STAGES)

def torchcam_run(x):
    from torchcam.methods import GradCAM
    with GradCAM(net, layers) as extract:
        out = net(x)
        for k in CLASSES: extract(k, out, normalized=False, retain_graph=k != CLASSES[-1])

def torchcam_plain(): torchcam_run(x)
def torchcam_frozen(): frozen(torchcam_run)()

def pgc_documented():
    "As its README has it: an object for a layer, a call for a class"
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    for l in layers:
        with GradCAM(model=net, target_layers=[l]) as cam:
            for k in CLASSES: cam(input_tensor=x, targets=[ClassifierOutputTarget(k)]*len(x))
    net.zero_grad(set_to_none=True)

def pgc_best():
    "One object for all layers, frozen parameters; its maps before it averages them over layers"
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    def run(x):
        with GradCAM(model=net, target_layers=layers) as cam:
            for k in CLASSES: cam(input_tensor=x, targets=[ClassifierOutputTarget(k)]*len(x))
    frozen(run)()

def captum_documented():
    from captum.attr import LayerGradCam
    for l in layers:
        attr = LayerGradCam(net, l)
        for k in CLASSES: attr.attribute(x, k)

def loop():
    "The tutorial's way: an image at a time, two hooks, a class and a layer at a time"
    for i in range(len(x)):
        for l in layers:
            for k in CLASSES:
                kept = {}
                hooks = [l.register_forward_hook(lambda m, inp, out: kept.update(a=out.detach())),
                         l.register_full_backward_hook(lambda m, gi, go: kept.update(g=go[0].detach()))]
                net(x[i:i+1])[0, k].backward()
                for o in hooks: o.remove()
                (kept['g'][0].mean((1, 2), keepdim=True)*kept['a'][0]).sum(0)
    net.zero_grad(set_to_none=True)

WHAT = dict(forward='one inference forward', ours_1='dicomcam, last stage, one class', ours_8='dicomcam, 2 x 4', torchcam_plain='torchcam, 2 x 4, as documented',
            torchcam_frozen='torchcam, 2 x 4, frozen parameters', pgc_best='pytorch-grad-cam, 2 x 4, at its best', captum_documented='captum, 2 x 4',
            pgc_documented='pytorch-grad-cam, 2 x 4, as documented', loop='hooks, an image at a time, 2 x 4')
SLOW = 'captum_documented', 'pgc_documented', 'loop'

def timed(f):
    if args.device == 'cuda': torch.cuda.synchronize()
    t = time.perf_counter()
    f()
    if args.device == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()-t

def peak(f):
    "MB at the peak above what is there before"
    if args.device == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        return (torch.cuda.max_memory_allocated()-before)/2**20
    Path('/proc/self/clear_refs').write_text('5') # the peak so far, of importing torch for one, is forgotten
    now = lambda k: int(re.search(rf'{k}:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024
    before = now('VmRSS')
    f()
    return now('VmHWM') - before

if args.memory:
    print(peak(globals()[args.memory]))
    sys.exit()

names = [n for n in WHAT if n == 'forward' or ((not args.only or n in args.only) and not (args.quick and n in SLOW))]
times, gone = {n: [] for n in names}, {}
for r in range(args.runs+1): # the first round warms up
    for n in names:
        if n in gone: continue
        try: t = timed(globals()[n])
        except Exception as e: gone[n] = f'{type(e).__name__}: {str(e).splitlines()[0]}'; continue
        if r: times[n].append(t)
base = statistics.median(times['forward'])

def memory(n):
    out = subprocess.run([sys.executable, *sys.argv, '--memory', n], capture_output=True, text=True)
    return round(float(out.stdout)) if out.returncode == 0 else None

rows = {}
for n in names:
    if n in gone: rows[n] = dict(what=WHAT[n], error=gone[n]); continue
    m = statistics.median(times[n])
    rows[n] = dict(what=WHAT[n], seconds=round(m, 3), forwards=round(m/base, 2), peak_mb=memory(n) if args.device == 'cpu' else round(peak(globals()[n])))
gpu = torch.cuda.get_device_name() if args.device == 'cuda' else None
setup = dict(arch=args.arch, bs=args.bs, size=args.size, runs=args.runs, dtype=args.dtype, device=gpu or f'{platform.machine()}, {torch.get_num_threads()} threads', torch=torch.__version__)
print('  '.join(f'{k} {v}' for k, v in setup.items()))
for r in rows.values():
    print(f'{r["what"]:42}', r['error'] if 'error' in r else f'{r["seconds"]:8.3f} s {r["forwards"]:7.2f} forwards  {r["peak_mb"]} MB above the model')
if args.out:
    with open(args.out, 'w') as f: json.dump(dict(setup=setup, results=rows), f, indent=1)
