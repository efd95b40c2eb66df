"""Loading and training beside the tutorial's own code, in one run.

    python benchmarks/train.py speed FOLDER [--size 400] [--bs 8] [--rounds 3]    images per second, and ratios
    python benchmarks/train.py quality FOLDER                                    five folds by patient: AUC of the tutorial's recipe and of ours
    python benchmarks/train.py phantom [--seeds 1 2]                              trained on one seed, tested on another

The tutorial's side is fastai's `PILDicom` in a `DataBlock`, resized and augmented by fastai, in the faster of its two usual ways (each
item resized, or the batch) with 0 and with 2 workers. On a CPU its network, xresnet50 at 400 pixels, would train for hours, so there
`quality` gives both recipes the network and size of `default_recipe()`, and the tutorial's keeps its five epochs at 5e-4."""
import argparse, json, sys, tempfile, time, warnings
from pathlib import Path

warnings.simplefilter('ignore')
sys.modules['gdcm'] = None # it decodes JPEG several times slower than Pillow, and pydicom would prefer it
import numpy as np, pandas as pd, torch
from fastai.medical.imaging import PILDicom as TutorialDicom
from fastai.vision.all import CategoryBlock, ColReader, DataBlock, ImageBlock, IndexSplitter, LabelSmoothingCrossEntropy, Learner, Mish, Resize
from fastai.vision.all import RocAucBinary, accuracy, aug_transforms, ranger, set_seed
from fastai.vision.models import xresnet
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from dicomcam.data import phantom
from dicomcam.train import default_recipe, dicom_dls, label_table, train_learner

def tutorial_dls(path, table, size, bs, resize, num_workers, valid=None):
    block = DataBlock(blocks=(ImageBlock(cls=TutorialDicom), CategoryBlock), get_x=ColReader('file'), get_y=ColReader('label'),
                      splitter=IndexSplitter(list(range(len(table)//5)) if valid is None else valid),
                      item_tfms=Resize(size) if resize=='item' else None, batch_tfms=aug_transforms() if resize=='item' else aug_transforms(size=size))
    return block.dataloaders(table, bs=bs, num_workers=num_workers)

def batches(dls):
    "Seconds of one epoch: the training set, augmented, then the validation set"
    t = time.perf_counter()
    for dl in dls.train, dls.valid:
        for x, _ in dl: pass
    if x.is_cuda: torch.cuda.synchronize()
    return time.perf_counter()-t

def items(dls):
    "Seconds of the items alone, which is what a GPU that augments waits for"
    t = time.perf_counter()
    for dl in dls.train, dls.valid:
        for i in range(len(dl.dataset)): dl.after_item(dl.dataset[i])
    return time.perf_counter()-t

def timed(f):
    t = time.perf_counter()
    res = f()
    return res, time.perf_counter()-t

def speed(a):
    table, rows = label_table(a.folder), {}
    for k in range(a.rounds):
        for r, w in ('item', 0), ('item', 2), ('batch', 0), ('batch', 2):
            dls, made = timed(lambda: tutorial_dls(a.folder, table, a.size, a.bs, r, w))
            rows.setdefault(f'tutorial, {r} resized, {w} workers', []).append((made+batches(dls), batches(dls), items(dls) if w == 0 and r == 'item' else np.inf))
        for w in 0, 2:
            with tempfile.TemporaryDirectory() as d:
                dls, made = timed(lambda: dicom_dls(a.folder, size=a.size, bs=a.bs, cache=d, num_workers=w))
                rows.setdefault(f'dicomcam, {w} workers', []).append((made+batches(dls), batches(dls), items(dls) if w == 0 else np.inf))
    df = pd.DataFrame({k: len(table)/np.median(v, 0) for k, v in rows.items()}, index=['first epoch', 'later epochs', 'items alone']).T
    print(f'{len(table)} images at {a.size} px, batches of {a.bs}; images per second, medians of {a.rounds}; the first epoch holds the making of the dataloaders and of the cache')
    print(df.round(0).replace(0, np.nan).to_string(na_rep='-'))
    best = lambda who: df[df.index.str.startswith(who)].max()
    print('ratio of the faster of each:', (best('dicomcam')/best('tutorial')).round(1).to_dict())

def folds(path, seed=42, n=5):
    t, df = label_table(path), pd.read_csv(Path(path)/'labels.csv')
    df['fold'] = 0
    for k, (_, valid) in enumerate(StratifiedGroupKFold(n, shuffle=True, random_state=seed).split(t, t.label, t.group)): df.loc[valid, 'fold'] = k
    return t, df

def tutorial_fit(path, t, df, k, r):
    set_seed(k, reproducible=True)
    valid = np.flatnonzero(df.fold == k)
    dls = tutorial_dls(path, t, r['size'], r['bs'] or 8, 'item', 0, valid)
    net = getattr(xresnet, r['arch'])(pretrained=False, act_cls=Mish, sa=True, n_out=2, c_in=dls.one_batch()[0].shape[1])
    learn = Learner(dls, net, loss_func=LabelSmoothingCrossEntropy(), metrics=[accuracy, RocAucBinary()], opt_func=ranger)
    with learn.no_bar(), learn.no_logging(): learn.fit_flat_cos(5, 5e-4)
    return learn, valid

def our_fit(path, t, df, k, r):
    learn = train_learner(path, k, fit=False, data=dict(labels=df, fold=k), **r)
    with learn.no_bar(), learn.no_logging(): learn.fit_flat_cos(r['epochs'], r['lr'])
    return learn, np.flatnonzero(df.fold == k)

def quality(a):
    (t, df), r, rows = folds(a.folder), default_recipe(), {}
    truth = (t.label == sorted(t.label.unique())[1]).to_numpy()
    for name, fit in ('dicomcam', our_fit), ('tutorial', tutorial_fit):
        start, scores, aucs = time.perf_counter(), np.zeros(len(t)), []
        for k in range(5):
            learn, valid = fit(a.folder, t, df, k, r)
            with learn.no_bar(): p = learn.get_preds()[0][:, 1].numpy()
            scores[valid] = p
            aucs.append(roc_auc_score(truth[valid], p))
            print(name, 'fold', k, round(aucs[-1], 3), flush=True)
        patients = pd.factorize(t.group)[0]
        rng, own = np.random.default_rng(0), [np.flatnonzero(patients == i) for i in range(patients.max()+1)]
        def mean_auc(idx): return np.mean([roc_auc_score(truth[i], scores[i]) for i in (idx[df.fold.to_numpy()[idx] == k] for k in range(5))])
        boot = [mean_auc(np.concatenate([own[i] for i in rng.integers(0, len(own), len(own))])) for _ in range(1000)]
        rows[name] = dict(mean_auc=round(np.mean(aucs), 3), low=round(np.quantile(boot, .025), 3), high=round(np.quantile(boot, .975), 3),
                          folds=[round(o, 3) for o in aucs], minutes=round((time.perf_counter()-start)/60, 1))
    print(json.dumps(dict(recipe=r, **rows), indent=1))

def on_phantom(a):
    train, test = (phantom(seed=o) for o in a.seeds)
    learn = train_learner(train, a.seeds[0])
    t = label_table(test)
    with learn.no_bar(): p = learn.get_preds(dl=learn.dls.test_dl(t.file.tolist()))[0][:, 1].numpy()
    print(json.dumps(dict(trained_on=a.seeds[0], tested_on=a.seeds[1], images=len(t), auc=round(roc_auc_score(t.label == learn.dls.vocab[1], p), 4))))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(required=True)
    for f, name in (speed, 'speed'), (quality, 'quality'):
        s = sub.add_parser(name); s.set_defaults(run=f)
        s.add_argument('folder')
        if f is speed:
            for o, v in ('--size', 400), ('--bs', 8), ('--rounds', 3): s.add_argument(o, type=int, default=v)
    s = sub.add_parser('phantom'); s.set_defaults(run=on_phantom)
    s.add_argument('--seeds', nargs=2, type=int, default=[1, 2])
    a = p.parse_args()
    a.run(a)
