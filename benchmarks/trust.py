"""The phantom's targets for heatmaps that can be trusted: do they point at the lesion, and can one tell which do not?

    python benchmarks/trust.py [--seeds 1 2 3] [--models FOLDER] [--choose 201] [--judge 101 102 103] [--n 250] [--keep FOLDER] [--out FILE]

For each seed a network is trained as `dicomcam demo` does (phantom, split and training of that seed), or FOLDER/s1/model.safetensors, ... are
taken. Method and layer ("picked": one for all seeds), the number that tells right from wrong maps, and its witnesses are chosen on the films
of the phantom `--choose`, and the threshold below which a map is not read comes from there too; all of it is judged on the phantoms `--judge`,
which neither a network nor a choice has seen. Lesions and maps are compared on the network's pixels, 144 x 144, with 3 % of tolerance. Beside it stands what `choose_layer` ships. Intervals are by patient: a patient's films, as
three networks see them, are one. `--keep` keeps what was measured of each network and phantom, so that a run that was cut off goes on."""
import argparse, json, pickle, sys, time, warnings
from pathlib import Path

warnings.simplefilter('ignore')
sys.modules['gdcm'] = None # it decodes JPEG several times slower than Pillow, and pydicom would prefer it
import cv2, numpy as np, pandas as pd

from dicomcam.absolute import choose_scale, film_maxima
from dicomcam.attribution import attribute
from dicomcam.batches import dicom_dls
from dicomcam.choice import CANDIDATES, choose_layer, late_stages, training_prior
from dicomcam.data import lesion_mask
from dicomcam.files import plain_progress
from dicomcam.froc import froc
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

def witnesses(method, layer, stages, plain, mirror, trainings):
    "Sets of maps that may confirm the one of `method` and `layer`, which comes first in each."
    def at(maps, *names): return [maps[method][o] for o in names]
    close = [o for o in near(layer, stages) if o != layer]
    first, turned, others = at(plain, layer), at(mirror, layer), [o[layer] for o in trainings[method]]
    sets = {'alone': [], 'mirror image': turned, 'neighbouring stages': at(plain, *close),
        'mirror image, neighbouring stages': turned+at(plain, *close)+at(mirror, *close)}
    if others: sets |= {'other trainings': others, 'mirror image, other trainings': turned+others}
    return {name: first+more for name, more in sets.items()}

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
    methods = sorted({m for m, _ in shown})
    def apart(h): return {o.layers[0]: at_input(o) for o in layer_by_layer(h)}
    plain, mirror, trainings = {}, {}, {m: [] for m in methods}
    for m in methods:
        one, turned = map_copies(learn, files, CLS, stages, m, factors=[])
        plain[m], mirror[m] = apart(one), apart(turned)
        trainings[m] = [apart(gradcam(o, files, CLS, stages, m)) for o in others]
    sets = {(m, l): witnesses(m, l, stages, plain, mirror, trainings) for m, l in shown}
    signals = {(*o, name): trust_signals(hs, CLS) for o, of in sets.items() for name, hs in of.items()}
    side = learn.dls.setup.size
    masks = [shrunk(lesion_mask(path, o), side) if ill else None for o, ill in zip(files, called.ill)]
    maps = [plain[m][l] for m, l in shown]
    if len(shown) < len(CANDIDATES)+1: maps += [map_spread([plain[m][l], mirror[m][l]], 'copies').mean for m, l in shown] # to be judged
    values = measures_by_image(maps, masks, CLS, measures=('pointing', 'mass'), prior=prior)
    return dict(films=table.drop(columns='file').assign(file=[o.name for o in table.file]), called=called.drop(columns='file'),
        values=values, signals=pd.concat(signals, axis=1))

def part(seed, on, shown, nets, args):
    "What `measure` says, kept."
    fn = args.keep and args.keep/f's{seed}_p{on}.pkl'
    if fn and fn.is_file():
        res = pickle.loads(fn.read_bytes())
        if set(shown) <= {o[:2] for o in res['values']}: return res
    start, learn = time.monotonic(), nets[seed]
    others = [nets[o] for o in nets if o != seed and args.others]
    res = measure(learn, *films(on, args), shown, others, training_prior(learn))
    print(f'seed {seed} on phantom {on}: {len(res["values"])} lesions found, {time.monotonic()-start:.0f} s', flush=True)
    if fn:
        fn.parent.mkdir(parents=True, exist_ok=True)
        fn.write_bytes(pickle.dumps(res))
    return res

# --- healthy films ---

def absolute(seed, on, net, args):
    "What is lit on a scale of the network's own films (`choose_scale`), on a phantom that it has not seen: lesions, healthy films, false regions."
    fn = args.keep and args.keep/f's{seed}_p{on}_scale.pkl'
    if fn and fn.is_file(): return pickle.loads(fn.read_bytes())
    if not getattr(net, 'heat_scale', None): choose_scale(net, cls=CLS)
    scale, (path, table) = net.heat_scale, films(on, args)
    h = at_input(attribute(net, table.file.tolist(), CLS, scale.layer, net.choice['method'], scale.smooth))
    masks = [shrunk(lesion_mask(path, o), net.dls.setup.size) if ill else None for o, ill in zip(table.file, table.label == CLS)]
    at = froc(h, masks, CLS, group=table.group.to_numpy(), thresholds=[scale.threshold], hit='peak').iloc[0]
    any_ = [bool((h.native(i, CLS).numpy()[m] >= scale.threshold).any()) for i, m in enumerate(masks) if m is not None]
    res = dict(scale=str(scale), method=scale.method, layer=scale.layer, group=table.group[table.label == CLS].tolist(), lit=any_,
        dark=(film_maxima(h, CLS) < scale.threshold)[[m is None for m in masks]].tolist(), healthy=table.group[table.label != CLS].tolist(),
        **at[['sensitivity', 'fp_healthy']].to_dict())
    print(f'seed {seed} on phantom {on}: {res["method"]} at {res["layer"]}, {res["scale"]}', flush=True)
    if fn: fn.write_bytes(pickle.dumps(res))
    return res

def absolute_rows(parts):
    "Of all networks and phantoms: lesions that are lit anywhere, by the peak of a region, healthy films that are dark, false regions on those."
    def rows(values, group):
        v = pd.Series([x for (_, on), o in parts.items() for x in o[values]])
        return row(v, pd.Series([f'{on} {x}' for (_, on), o in parts.items() for x in o[group]]))
    of = {f'{name} (mean of the parts)': np.mean([o[name] for o in parts.values()]) for name in ('sensitivity', 'fp_healthy')}
    return {'lesions lit': rows('lit', 'group'), 'healthy films dark': rows('dark', 'healthy')}, of

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

def best_signal(parts, maps):
    """The number of the smallest mean area under the risk-coverage curve, over all `maps` (method, layer) that were tried: one alone misses too
    seldom to tell. Of those that are there for every map; with the table."""
    areas = {}
    for o in maps:
        right, group, _, signals = trust_rows(parts, lambda seed: o)
        signals = signals.loc[:, signals.notna().all()]
        areas[' '.join(o)] = risk_areas(right, signals, group, n=2).value
    table = pd.DataFrame(areas).dropna()
    table = table.assign(mean=table.mean(axis=1)).sort_values('mean')
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

def main(args):
    plain_progress()
    nets = {seed: network(seed, args.models) for seed in args.seeds}
    shipped = {seed: (learn.choice['method'], learn.choice['layer']) for seed, learn in nets.items()}
    stages = late_stages(nets[args.seeds[0]])
    every = [(m, l) for m in CANDIDATES for l in stages]
    chosen = {(seed, args.choose): part(seed, args.choose, every, nets, args) for seed in args.seeds}
    means = pd.concat([o['values'].xs('pointing', axis=1, level='measure') for o in chosen.values()]).mean()
    mass = pd.concat([o['values'].xs('mass', axis=1, level='measure') for o in chosen.values()]).mean()
    table = pd.DataFrame(dict(pointing=means, mass=mass)).sort_values(['pointing', 'mass'], ascending=False)
    print(f'\nOn phantom {args.choose}, all seeds:\n{table.round(3).to_string()}')
    picked = max(every, key=lambda o: tuple(table.loc[o]))
    print(f'\npicked: {picked[0]} at layer {picked[1]}; shipped by choose_layer: {shipped}', flush=True)
    judged = {(seed, on): part(seed, on, [picked, shipped[seed]] if picked != shipped[seed] else [picked], nets, args)
        for on in args.judge for seed in args.seeds}
    names = {'picked': lambda seed: picked, 'choose_layer': lambda seed: shipped[seed]}
    res = dict(picked=picked, shipped=shipped, judged=args.judge, n=args.n, choosing=table.reset_index().to_dict('records'))
    tried = [o for o in every if table.pointing[o] > .5]
    signal, areas = best_signal(chosen, tried)
    print(f'\nWhat tells, on phantom {args.choose} (area under risk and coverage):\n{areas.head(12).round(4).to_string()}\n...\n{areas.loc[["chance"]].round(4).to_string()}')
    for k, name in names.items():
        show(f'Pointing game, lesions found, {k}', game := pointing(judged, name))
        mean = lambda seed: (f'{name(seed)[0]}, {COPIES}', name(seed)[1])
        show(f'The same of the mean with the mirror image, {k}', copies := pointing(judged, mean))
        rule = abstaining(chosen, judged, name, signal)
        show(f'Not read below the threshold of phantom {args.choose} by "{signal}", {k}', rule)
        called = abstaining(chosen, judged, name, signal, found=False)
        show('The same over all films called ill, false alarms being wrong', called)
        res[k] = dict(pointing=game, copies=copies, abstention=rule, called=called)
    res |= dict(signal=signal, areas=areas.to_dict('index'))
    if args.scale:
        lit, means = absolute_rows({(s, on): absolute(s, on, nets[s], args) for on in args.judge for s in args.seeds})
        show('On the absolute scale of films that the network was trained or validated on', lit)
        print('\n'.join(f'  {k}: {v:.3f}' for k, v in means.items()))
        res |= dict(scale=lit | means)
    if args.out: args.out.write_text(json.dumps(res, indent=1, default=str))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', nargs='*', type=int, default=[1, 2, 3])
    p.add_argument('--models', type=Path, default=Path('trust_models'), help='folder of s1/model.safetensors, ...; what is not there is trained and put there')
    p.add_argument('--choose', type=int, default=201)
    p.add_argument('--judge', nargs='*', type=int, default=[101, 102, 103])
    p.add_argument('--n', type=int, default=250)
    p.add_argument('--scale', action='store_true', help='healthy films too, on the absolute scale')
    p.add_argument('--others', action='store_true', help='the networks of the other seeds are witnesses too')
    p.add_argument('--phantoms', type=Path, help='folder for the phantoms ph201, ...; without it they are in the cache')
    p.add_argument('--keep', type=Path, help='folder for what was measured of each network and phantom')
    p.add_argument('--out', type=Path)
    main(p.parse_args())
