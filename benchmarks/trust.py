"""The phantom's targets for heatmaps that can be trusted: do they point at the lesion, and can one tell which do not?

    python benchmarks/trust.py [--seeds 1 2 3] [--models FOLDER] [--choose 201 202 203] [--judge 101 102 103] [--n 250] [--keep FOLDER] [--out FILE]

For each seed a network is trained as `dicomcam demo` does (phantom, split and training of that seed), or FOLDER/s1/model.safetensors, ... are
taken. The map ("picked": one method and layer for all seeds, of the film or the mean with its mirror image), the number that tells right from
wrong maps, and its witnesses are chosen on the films of the phantoms `--choose`, and the threshold below which a map is not read comes from
there too; all of it is judged on the phantoms `--judge`, which neither a network nor a choice has seen. Lesions and maps are compared on the
network's pixels, 144 x 144, with 3 % of tolerance. Beside it stands what `choose_layer` ships. Intervals are by patient: a patient's films, as
three networks see them, are one. `--keep` keeps what was measured of each network and phantom, so that a run that was cut off goes on. Healthy
films on the absolute scale are benchmarks/scale.py's."""
import argparse, json, pickle, sys, time, warnings
from pathlib import Path

warnings.simplefilter('ignore')
sys.modules['gdcm'] = None # it decodes JPEG several times slower than Pillow, and pydicom would prefer it
import cv2, numpy as np, pandas as pd

from dicomcam.batches import dicom_dls
from dicomcam.choice import CANDIDATES, choose_layer, late_stages
from dicomcam.guide import training_prior
from dicomcam.data import lesion_mask
from dicomcam.files import plain_progress
from dicomcam.gradcam import gradcam
from dicomcam.heatmaps import Heatmaps
from dicomcam.intervals import mean_interval, paired_difference
from dicomcam.labels import label_table
from dicomcam.localize import measures_by_image
from dicomcam.models import load_model, save_model
from dicomcam.phantom import phantom
from dicomcam.repeat import abstain, abstention, layer_by_layer, map_copies, map_spread, risk_areas, trust_signals
from dicomcam.training import train_learner

CLS, BASELINES = 'Pneumothorax', ('centre', 'noise', 'edges', 'prior')
COPIES = 'mean of 2 copies'

# --- networks and films ---

def network(seed, models):
    "The network of a seed, trained where it is not at hand, and what `choose_layer` chose for it."
    fn, path = models/f's{seed}'/'model.safetensors', phantom(seed=seed)
    if not fn.is_file():
        fn.parent.mkdir(parents=True, exist_ok=True)
        learn = train_learner(path, seed, pretrained=False)
        choose_layer(learn)
        save_model(learn, fn)
    return load_model(fn, dicom_dls(path, seed=seed, size=144)) # its own films, for the prior and the scale

def films(seed, args):
    "Folder and films of a phantom: file, label, group."
    path = phantom(args.phantoms and args.phantoms/f'ph{seed}', n=args.n, seed=seed)
    return path, label_table(path)

# --- one network on one phantom ---

def near(layer, layers):
    "A layer and its neighbours."
    i = layers.index(layer)
    return layers[max(0, i-1):i+2]

def copies_of(method): return f'{method}, {COPIES}'

def witnesses(method, layer, stages, plain, mirror, means, trainings):
    "Sets of maps that may confirm the one of `method` and `layer`, which comes first in each."
    name = method.partition(', ')[0]
    plain, mirror, means = plain[name], mirror[name], means[name]
    close = [o for o in near(layer, stages) if o != layer]
    def stages_of(*maps): return [o[k] for o in maps for k in close]
    if method != name:
        both = [plain[layer], mirror[layer]]
        sets = {'alone': [], 'both copies': both, 'neighbouring stages': stages_of(means),
            'both copies, neighbouring stages': both+stages_of(plain, mirror)}
        return {k: [means[layer], *more] for k, more in sets.items()}
    turned, others = [mirror[layer]], [o[layer] for o in trainings[name]]
    sets = {'alone': [], 'mirror image': turned, 'neighbouring stages': stages_of(plain),
        'mirror image, neighbouring stages': turned+stages_of(plain, mirror)}
    if others: sets |= {'other trainings': others, 'mirror image, other trainings': turned+others}
    return {k: [plain[layer], *more] for k, more in sets.items()}

def at_input(h):
    "Heatmaps as if the network's pixels were the original's."
    return Heatmaps(h.raw, h.images, h.probs, h.classes, h.layers, h.method, vocab=h.vocab)

def shrunk(mask, side): return cv2.resize(255*mask.astype(np.uint8), (side, side), interpolation=cv2.INTER_AREA) > 127

def measure(learn, path, table, shown, others, prior):
    "Of the films that the network calls ill: is each map's brightest point in the lesion, and what tells? Film by film."
    table = table.assign(ill=table.label == CLS)
    last = late_stages(learn)[-1:]
    probs = np.concatenate([h.probs[:, h.cls(0, CLS)] for h in gradcam(learn, table.file.tolist(), CLS, last, batches=True)])
    table = table.assign(p=probs)
    called = table[table.p >= .5].reset_index(drop=True)
    files, stages = called.file.tolist(), late_stages(learn)
    def apart(h): return {o.layers[0]: at_input(o) for o in layer_by_layer(h)}
    plain, mirror, trainings = {}, {}, {}
    for m in sorted({m.partition(', ')[0] for m, _ in shown}):
        one, turned = map_copies(learn, files, CLS, stages, m, factors=[])
        plain[m], mirror[m] = apart(one), apart(turned)
        trainings[m] = [apart(gradcam(o, files, CLS, stages, m)) for o in others]
    side = learn.dls.setup.size
    masks = [shrunk(lesion_mask(path, o), side) if ill else None for o, ill in zip(files, called.ill)]
    called = called.assign(file=[o.name for o in called.file])
    films = table.assign(file=[o.name for o in table.file])
    return dict(films=films, called=called, **judge(shown, masks, plain, mirror, trainings, prior))

def judge(shown, masks, plain, mirror, trainings, prior):
    "Where the maps `shown` point, and what tells, from the maps of all methods and stages."
    means = {m: {k: map_spread([o, mirror[m][k]], 'copies').mean for k, o in of.items()} for m, of in plain.items()}
    of = {**plain, **{copies_of(m): o for m, o in means.items()}}
    stages = list(next(iter(plain.values())))
    sets = {o: witnesses(*o, stages, plain, mirror, means, trainings) for o in shown}
    signals = {(*o, name): trust_signals(hs, CLS) for o, by in sets.items() for name, hs in by.items()}
    also = [(copies_of(m), k) for m, k in shown if m in plain] # to be judged
    maps = [of[m][k] for m, k in dict.fromkeys([*shown, *also])]
    values = measures_by_image(maps, masks, CLS, measures=('pointing', 'mass'), prior=prior)
    return dict(values=values, signals=pd.concat(signals, axis=1))

def part(seed, on, shown, nets, args):
    "What `measure` says, kept."
    fn = args.keep and args.keep/f's{seed}_p{on}.pkl'
    if fn and fn.is_file():
        res = pickle.loads(fn.read_bytes())
        if set(shown) <= {o[:2] for o in res['signals']}: return res
    start, learn = time.monotonic(), nets[seed]
    others = [nets[o] for o in nets if o != seed and args.others]
    res = measure(learn, *films(on, args), shown, others, training_prior(learn))
    print(f'seed {seed} on phantom {on}: {len(res["values"])} lesions found, {time.monotonic()-start:.0f} s', flush=True)
    if fn:
        fn.parent.mkdir(parents=True, exist_ok=True)
        fn.write_bytes(pickle.dumps(res))
    return res

# --- all together ---

def hits(parts, name):
    "Does each found lesion's map hit? Patient by patient of each phantom; `name`: of a part, the map and layer."
    rows = [(seed, f'{on} {o["called"].group[i]}', o['values'][(*name(seed), 'pointing')][i]) for (seed, on), o in parts.items() for i in o['values'].index]
    return pd.DataFrame(rows, columns=['seed', 'group', 'hit'])

def row(hits, group): return dict(zip(('value', 'low', 'high', 'n'), (*mean_interval(hits.to_numpy(), group=group.to_numpy(), hits=True), len(hits))))

def pointing(parts, name):
    "The pointing game of a map, by seed and of all; of each baseline; and how much the map is ahead, with the interval and p of the pairs."
    h = hits(parts, name)
    res = {'all': row(h.hit, h.group), **{f'seed {s}': row(o.hit, o.group) for s, o in h.groupby('seed')}}
    for b in BASELINES:
        o = hits(parts, lambda seed: (b, ''))
        res[b] = row(o.hit, o.group)
        res[f'ahead of {b}'] = paired_difference(h.hit, o.hit, h.group, hits=True)
    return res

def trust_rows(parts, name, which=None, found=True):
    "Right or wrong, patients, and signals of every map that is shown: of found lesions, or of all films called ill, false alarms being wrong."
    right, group, seeds, signals = [], [], [], []
    for (seed, on), o in parts.items():
        m, l = name(seed)
        index = o['values'].index if found else o['called'].index
        hit = o['values'][m, l, 'pointing'].reindex(index).fillna(0) >= .5
        s = o['signals'].loc[index, (m, l)]
        s.columns = [f'{signal}; {w}' for w, signal in s.columns]
        right += hit.tolist()
        group += [f'{on} {o["called"].group[i]}' for i in index]
        seeds += [seed]*len(index)
        signals.append(s if which is None else s[[which]])
    return np.array(right), np.array(group), np.array(seeds), pd.concat(signals, ignore_index=True)

def best_signal(parts, name):
    "The number of the smallest area under the risk-coverage curve of the maps that are shown, with the table."
    right, group, _, signals = trust_rows(parts, name)
    table = risk_areas(right, signals.dropna(axis=1, how='all'), group)
    return next(o for o in table.index if ';' in o), table

def abstaining(chosen, judged, name, signal, found=True):
    "The rule with each network's own threshold, from the choosing phantom, where four in five maps are read."
    right, group, seeds, trust = trust_rows(judged, name, signal, found)
    _, _, other_seeds, others = trust_rows(chosen, name, signal)
    unread, share = np.zeros((2, len(right)), bool)
    for s in set(seeds):
        here = trust[signal][seeds == s]
        unread[seeds == s] = abstain(here, others[signal][other_seeds == s])
        share[seeds == s] = abstain(here, here) # no label is needed to read four in five of the films at hand
    areas, at_80 = risk_areas(right, trust, group), abstention(right, share, group)
    at_80.index = [f'{o}, four in five of these films read' for o in at_80.index]
    return dict(abstention(right, unread, group).to_dict('index'), **at_80.iloc[[0, 2, 3]].to_dict('index'), area=areas.loc[signal].to_dict(), chance=areas.loc['chance'].to_dict())

def text(o):
    "A figure with its interval, as a person writes it."
    p, n = f', p = {o["p"]:.4f}' if 'p' in o else '', f', n = {o["n"]}' if 'n' in o else ''
    return f'{o["value"]:.3f} ({o["low"]:.3f} to {o["high"]:.3f}){n}{p}'

def show(title, rows):
    print(f'\n{title}')
    for k, o in rows.items(): print(f'  {k}: {text(o)}')

def rounded(table): return table.round(4).to_string()

def main(args):
    plain_progress()
    nets = {seed: network(seed, args.models) for seed in args.seeds}
    shipped = {seed: (learn.choice['method'], learn.choice['layer']) for seed, learn in nets.items()}
    stages = late_stages(nets[args.seeds[0]])
    every = [(m, k) for m in [*CANDIDATES, *map(copies_of, CANDIDATES)] for k in stages]
    chosen = {(seed, on): part(seed, on, every, nets, args) for on in args.choose for seed in args.seeds}
    def mean(measure): return pd.concat([o['values'].xs(measure, axis=1, level='measure') for o in chosen.values()]).mean()
    table = pd.DataFrame(dict(pointing=mean('pointing'), mass=mean('mass'))).sort_values(['pointing', 'mass'], ascending=False)
    print(f'\nOn the phantoms {args.choose}, all seeds:\n{table.round(3).to_string()}')
    picked = max(every, key=lambda o: tuple(table.loc[o]))
    print(f'\npicked: {picked[0]} at layer {picked[1]}; shipped by choose_layer: {shipped}', flush=True)
    judged = {(seed, on): part(seed, on, list(dict.fromkeys([picked, shipped[seed]])), nets, args) for on in args.judge for seed in args.seeds}
    names = {'picked': lambda seed: picked, 'choose_layer': lambda seed: shipped[seed]}
    res = dict(picked=picked, shipped=shipped, judged=args.judge, n=args.n, choosing=table.reset_index().to_dict('records'))
    for k, name in names.items():
        signal, areas = best_signal(chosen, name)
        print(f'\nWhat tells, {k} (area under risk and coverage, phantoms {args.choose}):\n{rounded(areas.head(8))}\n...\n{rounded(areas.loc[["chance"]])}')
        show(f'Pointing game, lesions found, {k}', game := pointing(judged, name))
        rule = abstaining(chosen, judged, name, signal)
        show(f'Not read below the threshold of the phantoms {args.choose} by "{signal}", {k}', rule)
        called = abstaining(chosen, judged, name, signal, found=False)
        show('The same over all films called ill, false alarms being wrong', called)
        res[k] = dict(pointing=game, abstention=rule, called=called, signal=signal, areas=areas.to_dict('index'))
        if name(args.seeds[0])[0] == picked[0]: continue
        show(f'Pointing game of the mean with the mirror image, {k}', copies := pointing(judged, lambda seed: (copies_of(name(seed)[0]), name(seed)[1])))
        res[k]['copies'] = copies
    if args.out: args.out.write_text(json.dumps(res, indent=1, default=str))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', nargs='*', type=int, default=[1, 2, 3])
    p.add_argument('--models', type=Path, default=Path('trust_models'), help='folder of s1/model.safetensors, ...; what is not there is trained and put there')
    p.add_argument('--choose', nargs='*', type=int, default=[201, 202, 203])
    p.add_argument('--judge', nargs='*', type=int, default=[101, 102, 103])
    p.add_argument('--n', type=int, default=250)
    p.add_argument('--others', action='store_true', help='the networks of the other seeds are witnesses too')
    p.add_argument('--phantoms', type=Path, help='folder for the phantoms ph201, ...; without it they are in the cache')
    p.add_argument('--keep', type=Path, help='folder for what was measured of each network and phantom')
    p.add_argument('--out', type=Path)
    main(p.parse_args())
