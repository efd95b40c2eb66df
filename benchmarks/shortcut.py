"""How much does a network read, and how much does it look? A dose-response over how often a word goes with the disease.

    python benchmarks/shortcut.py [--r none .5 .7 .9 1] [--seeds 1 2 3] [--n 400] [--size 64] [--epochs 16] [--out FILE.json]
    python benchmarks/shortcut.py --model FILE.safetensors [--layers -7 -6 -5]

A small network (three convolutions and a linear layer) is trained on phantoms in which a share r of the ill and 1-r of the
well carry the word SUPINE, and tested on other patients of whom a share 1-r of the ill do (Viviano and others 2021).
`none` is the control: no word on any film. Then, on films with both a pneumothorax and the word, either is taken away
alone, and nothing else: what is lost of the log-odds, and where was Grad-CAM, at the last layer (2) and the one before?

Each seed draws the weights, the order of the films and who carries the word; figures are means over the seeds, with 95 %
intervals by patient.

The second form takes 24 lesions off phantom films (seed 11) and asks of a model trained by `dicomcam demo`, on another
seed, whether it reacts, and of its maps whether they show the lesion."""
import argparse, json, warnings
from pathlib import Path

warnings.simplefilter('ignore')
import numpy as np, pandas as pd, torch
from fastai.vision.all import AdaptiveAvgPool, ConvLayer, CrossEntropyLossFlat, DataLoaders, Flatten, Learner, no_random
from torch import nn

from dicomcam.causal import causal_effects, causal_table
from dicomcam.gradcam import gradcam
from dicomcam.models import load_model
from dicomcam.intervals import fewest_patients, interval, mean_interval, patient_resamples, roc_area, roc_counts
from dicomcam.pairs import phantom_pairs, read_pairs, tied
from dicomcam.phantom import CLASSES
from dicomcam.pixels import dicom_pixels
from dicomcam.projection import burn_in

LAYERS = '2', '1'

def images(files): return torch.stack([torch.tensor(dicom_pixels(o))[None] for o in files]).float()

def is_ill(table): return torch.tensor((table.label == CLASSES[1]).values)

def small_network():
    convs = ConvLayer(1, 16, 5, stride=2), ConvLayer(16, 32, stride=2), ConvLayer(32, 64, stride=2)
    return nn.Sequential(*convs, AdaptiveAvgPool(), Flatten(), nn.Linear(64, 2))

def trained(x, y, seed, epochs):
    "A small network in evaluation mode, trained on images `x` with labels `y`."
    with no_random(seed, reproducible=False):
        films = list(zip(x, y))
        dls = DataLoaders.from_dsets(films, films[:16], bs=16, num_workers=0, device='cpu')
        learn = Learner(dls, small_network(), CrossEntropyLossFlat())
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2)
    return learn.model.eval()

class Films:
    "The two films of each pair of words, and which to take."
    def __init__(self, n, size, seed):
        self.folder = phantom_pairs(n=n, size=size, seed=seed, change='word')
        pairs = read_pairs(self.folder)
        self.word, self.plain, self.ill, self.patient = images(pairs.file), images(pairs.twin), is_ill(pairs), pairs.patient

    def at(self, r, seed):
        "One film a pair, at `r`; None: none with the word."
        shown = self.ill & False if r is None else torch.tensor(tied(self.folder, r, seed).shown.values)
        return torch.where(shown[:, None, None, None], self.word, self.plain)

class Both:
    "Ill films with the word, the same without one of the two, and where they are."
    def __init__(self, n, size, seed):
        pairs = read_pairs(phantom_pairs(n=n, size=size, seed=seed, change='lesion'))
        lesion, well = (np.uint8(images(o)[:, 0]*255+.5) for o in (pairs.file, pairs.twin))
        def with_word(films): return [burn_in(o, 'SUPINE', np.random.default_rng(i)) for i, o in enumerate(films)]
        def batch(films): return torch.tensor(np.stack(films))[:, None].float()/255
        both = with_word(lesion)
        self.films, self.patient = batch(both), pairs.patient.to_numpy()
        self.without = dict(word=batch(lesion), lesion=batch(with_word(well)))
        self.regions = dict(word=list(both != lesion), lesion=pairs.region.tolist())

    def effects(self, model):
        "What the score owes to either, and where the maps are: `causal_effects` of Grad-CAM alone."
        h = gradcam(model, self.films, 1, layers=LAYERS)
        of = {o: causal_effects(model, h, self.without[o], self.regions[o], 1) for o in self.without}
        return {o: table[table['map'] == 'gradcam'] for o, table in of.items()}

def auc(models, x, films):
    "Mean ROC AUC of the networks, and its interval by patient; `x`: films a network."
    weights = patient_resamples(films.patient, 1000, 0)
    with torch.no_grad(): scores = [model(o).softmax(1)[:, 1].numpy() for model, o in zip(models, x)]
    areas = [roc_area(*roc_counts(films.ill.numpy(), o, weights)) for o in scores]
    patients = fewest_patients(films.patient.to_numpy(), films.ill.numpy(), ~films.ill.numpy())
    return list(interval(np.mean(areas, 0), patients).values())

def row(r, args, train, test, both):
    "A dose: value, low and high of each figure."
    models = [trained(train.at(r, s), train.ill.long(), s, args.epochs) for s in args.seeds]
    reverse = r if r is None else 1-r
    figures = {'AUC at r': auc(models, [test.at(r, s) for s in args.seeds], test),
        'AUC at 1-r': auc(models, [test.at(reverse, s) for s in args.seeds], test),
        'AUC without the word': auc(models, [test.plain]*len(models), test)}
    effects, tables = [both.effects(model) for model in models], {}
    def mean(tables, measure): # over the seeds, then over the films
        values = np.mean([o[measure].to_numpy() for o in tables], 0)
        return [float(o) for o in mean_interval(values, group=both.patient, hits=measure == 'pointing')]
    for what in both.without:
        runs = {layer: [o[what][o[what].layer == layer] for o in effects] for layer in LAYERS}
        figures[f'log-odds owed to the {what}'] = mean(runs['2'], 'log_odds')
        for layer, of_layer in runs.items():
            for measure, verb in (('mass', 'heat of'), ('pointing', 'hits of')):
                figures[f'{verb} layer {layer} on the {what}'] = mean(of_layer, measure)
            pooled = pd.concat([o.assign(image=range(k*len(o), (k+1)*len(o))) for k, o in enumerate(of_layer)])
            group = np.tile(both.patient, len(models))
            tables[f'{what}, layer {layer}'] = causal_table(pooled, by='log_odds', at=1, group=group)
    return figures, tables

def of_model(file, layers):
    "`causal_table` of a saved model on 24 pairs of films."
    learn, pairs = load_model(file), read_pairs(phantom_pairs(n=24, size=256, seed=11, change='lesion'))
    maps = [gradcam(learn, pairs.file.tolist(), CLASSES[1], layers, o) for o in ('gradcam', 'hirescam')]
    effects = causal_effects(learn, maps, pairs.twin.tolist(), pairs.region.tolist(), CLASSES[1])
    print('probability with the lesion, and without:', *effects[['with', 'without']].mean().round(2))
    table = causal_table(effects, group=pairs.patient)
    print(table[table.pairs > 0].round(2).to_string())

def text(value, low, high): return f'{value:.2f} ({low:.2f} to {high:.2f})'

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--r', nargs='+', default=['none', '.5', '.7', '.9', '1'])
    p.add_argument('--seeds', nargs='+', type=int, default=[1, 2, 3])
    for option, value in ('--n', 400), ('--size', 64), ('--epochs', 16): p.add_argument(option, type=int, default=value)
    p.add_argument('--out', type=Path)
    p.add_argument('--model', type=Path)
    p.add_argument('--layers', nargs='+', type=int, default=[-7, -6, -5])
    args = p.parse_args()
    if args.model: raise SystemExit(of_model(args.model, args.layers))
    train, test, both = Films(args.n, args.size, 1), Films(200, args.size, 2), Both(60, args.size, 3)
    found = {}
    for dose in args.r:
        figures, tables = row(None if dose == 'none' else float(dose), args, train, test, both)
        name = 'no word' if dose == 'none' else f'r = {dose}'
        found[name] = figures
        print(name, *(f'  {k}: {text(*v)}' for k, v in figures.items()), sep='\n')
        for what, table in tables.items():
            cells = ', '.join(f'{o.verdict} {o.pairs}' for o in table.itertuples() if o.pairs)
            print(f'  without the {what}, {len(both.films)*len(args.seeds)} pairs: {cells}', flush=True)
    if args.out: args.out.write_text(json.dumps(found, indent=1))
