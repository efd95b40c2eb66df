"""All benchmarks, one after the other, and one table of what they measured.

    python benchmarks/all.py FOLDER [--out benchmarks.md] [--quick]

FOLDER holds labelled chest X-rays (JPEG Baseline), as for `dicomcam train`. Each row sets dicomcam beside the alternative that a
user would pick, both measured in the same run; the ratio is what carries over to another machine. `--quick` measures each once."""
import argparse, json, os, platform, subprocess, sys, tempfile
from pathlib import Path

here = Path(__file__).resolve().parent

def run(script, *args, out=None):
    "What a benchmark wrote as JSON: to the file `out`, or as the last thing that it printed."
    command = [sys.executable, str(here/script), *map(str, args)]
    if out: command += ['--out', str(out)]
    print('running', script, *args, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: sys.exit(f'{script} failed:\n{done.stderr[-2000:]}')
    text = Path(out).read_text() if out else done.stdout
    return json.loads(text)

def summary_rows(folder, rounds):
    "Files a second of `summarize`."
    r = run('summary.py', folder, '--rounds', rounds, '--many', 0)['files_per_s']
    yield 'A folder becomes a table', 'files/s', r['summarize'], "fastai's from_dicoms, its fastest setting", r['fastai']
    yield 'A folder becomes a table', 'files/s', r['summarize'], 'a bare loop that reads, parses and decodes', r['ceiling']

def train_rows(folder, rounds, tmp):
    "Images a second on the way into the network."
    speeds = run('train.py', 'speed', folder, '--rounds', rounds, out=tmp/'train.json')
    for what, r in speeds.items(): yield f'Images, {what}', 'images/s', r['dicomcam'], "the tutorial's DataBlock, its faster way", r['tutorial']

def cam_rows(runs, quick, tmp):
    "Grad-CAM of two classes at four layers, in forward passes, and the memory that it takes."
    results = run('cam.py', '--runs', runs, *(['--quick'] if quick else []), out=tmp/'cam.json')['results']
    ours = results['ours_8']
    others = {name: r for name, r in results.items() if name not in ('forward', 'ours_1', 'ours_8') and 'error' not in r}
    for r in others.values(): yield 'Grad-CAM, 2 classes x 4 layers', 'forward passes', ours['forwards'], r['what'], r['forwards']
    for r in others.values():
        if r['peak_mb']: yield 'Grad-CAM, 2 classes x 4 layers', 'MB', ours['peak_mb'], r['what'], r['peak_mb']

def table(rows):
    "A markdown table; where less is better, the ratio is turned round: above 1 dicomcam is ahead."
    lines = ['| what | unit | dicomcam | the alternative | | ratio |', '|---|---|---|---|---|---|']
    for what, unit, ours, name, theirs in rows:
        ahead = theirs/ours if unit in ('forward passes', 'MB') else ours/theirs
        lines.append(f'| {what} | {unit} | {ours:.4g} | {name} | {theirs:.4g} | {ahead:.2f} |')
    return '\n'.join(lines)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', help='labelled chest X-rays')
    p.add_argument('--out', type=Path, default=Path('benchmarks.md'))
    p.add_argument('--quick', action='store_true', help='one round each, without the slowest candidates')
    args = p.parse_args()
    rounds = 1 if args.quick else 3
    with tempfile.TemporaryDirectory() as d:
        rows = [*summary_rows(args.folder, rounds), *train_rows(args.folder, rounds, Path(d)), *cam_rows(rounds, args.quick, Path(d))]
    text = f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n\n{table(rows)}\n'
    args.out.write_text(text)
    print(text)
