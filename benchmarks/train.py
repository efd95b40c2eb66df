"""Loading and training beside the tutorial's own code, in one run.

    python benchmarks/train.py speed FOLDER [--size 400] [--bs 8] [--rounds 3] [--out FILE.json]  images per second, and ratios
    python benchmarks/train.py quality FOLDER      five folds by patient: AUC of the tutorial's recipe and of ours
    python benchmarks/train.py phantom [--seeds 1 2]                    trained on one seed, tested on another

The tutorial's side is fastai's `PILDicom` in a `DataBlock`, resized and augmented by fastai, in the faster of its two usual ways (each
item resized, or the batch) with 0 and with 2 workers. On a CPU its network, xresnet50 at 400 pixels, would train for hours, so there
`quality` gives both recipes the network and size of `default_recipe()`, and the tutorial's keeps its five epochs at 5e-4."""
import argparse, json, sys, tempfile, time, warnings
from pathlib import Path

warnings.simplefilter('ignore')
sys.modules['gdcm'] = None # it decodes JPEG several times slower than Pillow, and pydicom would prefer it
import numpy as np, pandas as pd, torch
from fastai.medical.imaging import PILDicom as TutorialDicom
from fastai.vision.all import CategoryBlock, ColReader, DataBlock, ImageBlock, IndexSplitter
from fastai.vision.all import LabelSmoothingCrossEntropy, Learner, Mish, Resize, RocAucBinary
from fastai.vision.all import accuracy, aug_transforms, ranger, set_seed
from fastai.vision.models import xresnet
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from dicomcam.batches import dicom_dls
from dicomcam.labels import has_class, label_table
from dicomcam.phantom import phantom
from dicomcam.training import default_recipe, train_learner

# --- speed ---

def tutorial_dls(path, table, size, bs, resize, num_workers, valid=None):
    "The tutorial's dataloaders, which resize each 'item' or the whole 'batch'."
    if valid is None: valid = list(range(len(table)//5))
    by_item = resize == 'item'
    block = DataBlock(blocks=(ImageBlock(cls=TutorialDicom), CategoryBlock),
        get_x=ColReader('file'), get_y=ColReader('label'), splitter=IndexSplitter(valid),
        item_tfms=Resize(size) if by_item else None,
        batch_tfms=aug_transforms() if by_item else aug_transforms(size=size))
    return block.dataloaders(table, bs=bs, num_workers=num_workers)

def epoch_seconds(dls):
    "Seconds of one epoch: the training set, augmented, then the validation set."
    start = time.perf_counter()
    for dl in dls.train, dls.valid:
        for x, _ in dl: pass
    if x.is_cuda: torch.cuda.synchronize()
    return time.perf_counter()-start

def item_seconds(dls):
    "Seconds of the items alone, which is what a GPU that augments waits for."
    start = time.perf_counter()
    for dl in dls.train, dls.valid:
        for i in range(len(dl.dataset)): dl.after_item(dl.dataset[i])
    return time.perf_counter()-start

def seconds(make, items):
    "Seconds of the first epoch, with the making of the dataloaders and of the cache; of the next one; of the items alone."
    start = time.perf_counter()
    dls = make()
    made = time.perf_counter()-start
    first, later = made+epoch_seconds(dls), epoch_seconds(dls)
    return first, later, item_seconds(dls) if items else np.inf

def speed(args):
    table, rows = label_table(args.folder), {}
    for _ in range(args.rounds):
        for resize, workers in ('item', 0), ('item', 2), ('batch', 0), ('batch', 2):
            def make(): return tutorial_dls(args.folder, table, args.size, args.bs, resize, workers)
            measured = seconds(make, items=workers == 0 and resize == 'item')
            rows.setdefault(f'tutorial, {resize} resized, {workers} workers', []).append(measured)
        for workers in 0, 2:
            with tempfile.TemporaryDirectory() as cache:
                def make(): return dicom_dls(args.folder, size=args.size, bs=args.bs, cache=cache, num_workers=workers)
                measured = seconds(make, items=workers == 0)
            rows.setdefault(f'dicomcam, {workers} workers', []).append(measured)
    rates = {name: len(table)/np.median(rounds, 0) for name, rounds in rows.items()}
    df = pd.DataFrame(rates, index=['first epoch', 'later epochs', 'items alone']).T
    print(f'{len(table)} images at {args.size} px, batches of {args.bs}; images per second, medians of {args.rounds}; '
        'the first epoch holds the making of the dataloaders and of the cache')
    print(df.round(0).replace(0, np.nan).to_string(na_rep='-'))
    best = pd.DataFrame({who: df[df.index.str.startswith(who)].max() for who in ('dicomcam', 'tutorial')})
    print('ratio of the faster of each:', (best.dicomcam/best.tutorial).round(1).to_dict())
    if args.out: args.out.write_text(json.dumps(best.round(1).to_dict('index'), indent=1))

# --- quality ---

def folds(path, seed=42, n=5):
    "The table, and labels.csv with a column `fold`: by patient, classes in proportion."
    table, df = label_table(path), pd.read_csv(Path(path)/'labels.csv')
    df['fold'] = 0
    split = StratifiedGroupKFold(n, shuffle=True, random_state=seed).split(table, table.label, table.group)
    for k, (_, valid) in enumerate(split): df.loc[valid, 'fold'] = k
    return table, df

def tutorial_fit(path, table, df, k, recipe):
    "The tutorial's recipe, fold `k` held back."
    set_seed(k, reproducible=True)
    valid = np.flatnonzero(df.fold == k)
    dls = tutorial_dls(path, table, recipe['size'], recipe['bs'] or 8, 'item', 0, valid)
    channels = dls.one_batch()[0].shape[1]
    net = getattr(xresnet, recipe['arch'])(pretrained=False, act_cls=Mish, sa=True, n_out=2, c_in=channels)
    metrics = [accuracy, RocAucBinary()]
    learn = Learner(dls, net, loss_func=LabelSmoothingCrossEntropy(), metrics=metrics, opt_func=ranger)
    with learn.no_bar(), learn.no_logging(): learn.fit_flat_cos(5, 5e-4)
    return learn, valid

def our_fit(path, table, df, k, recipe):
    "dicomcam's recipe, fold `k` held back."
    learn = train_learner(path, k, fit=False, data=dict(labels=df, fold=k), **recipe)
    with learn.no_bar(), learn.no_logging(): learn.fit_flat_cos(recipe['epochs'], recipe['lr'])
    return learn, np.flatnonzero(df.fold == k)

def mean_auc_interval(truth, scores, fold, patients, n=1000):
    "95 % interval of the mean AUC of the folds: patients drawn again and again."
    rng, codes = np.random.default_rng(0), pd.factorize(patients)[0]
    own = [np.flatnonzero(codes == i) for i in range(codes.max()+1)]
    def mean_auc(idx):
        parts = [idx[fold[idx] == k] for k in range(5)]
        return np.mean([roc_auc_score(truth[part], scores[part]) for part in parts])
    drawn = (rng.integers(0, len(own), len(own)) for _ in range(n))
    return np.quantile([mean_auc(np.concatenate([own[i] for i in o])) for o in drawn], [.025, .975])

def quality(args):
    (table, df), recipe, rows = folds(args.folder), default_recipe(pretrained=False), {}
    truth = has_class(table.label, sorted(table.label.unique())[1]).to_numpy()
    for name, fit in ('dicomcam', our_fit), ('tutorial', tutorial_fit):
        start, scores, aucs = time.perf_counter(), np.zeros(len(table)), []
        for k in range(5):
            learn, valid = fit(args.folder, table, df, k, recipe)
            with learn.no_bar(): scores[valid] = learn.get_preds()[0][:, 1].numpy()
            aucs.append(roc_auc_score(truth[valid], scores[valid]))
            print(name, 'fold', k, round(aucs[-1], 3), flush=True)
        low, high = mean_auc_interval(truth, scores, df.fold.to_numpy(), table.group)
        rows[name] = dict(mean_auc=round(np.mean(aucs), 3), low=round(low, 3), high=round(high, 3),
            folds=[round(o, 3) for o in aucs], minutes=round((time.perf_counter()-start)/60, 1))
    print(json.dumps(dict(recipe=recipe, **rows), indent=1))

# --- phantom ---

def on_phantom(args):
    train, test = (phantom(seed=seed) for seed in args.seeds)
    learn, table = train_learner(train, args.seeds[0], pretrained=False), label_table(test)
    with learn.no_bar(): probs, _ = learn.get_preds(dl=learn.dls.test_dl(table.file.tolist()))
    auc = roc_auc_score(has_class(table.label, learn.dls.vocab[1]), probs[:, 1].numpy())
    print(json.dumps(dict(trained_on=args.seeds[0], tested_on=args.seeds[1], images=len(table), auc=round(auc, 4))))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(required=True)
    s = sub.add_parser('speed')
    s.set_defaults(run=speed)
    s.add_argument('folder')
    for option, value in ('--size', 400), ('--bs', 8), ('--rounds', 3): s.add_argument(option, type=int, default=value)
    s.add_argument('--out', type=Path, help='JSON: images per second of the faster of each')
    s = sub.add_parser('quality')
    s.set_defaults(run=quality)
    s.add_argument('folder')
    s = sub.add_parser('phantom')
    s.set_defaults(run=on_phantom)
    s.add_argument('--seeds', nargs=2, type=int, default=[1, 2])
    args = p.parse_args()
    args.run(args)
