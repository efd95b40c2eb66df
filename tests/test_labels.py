"Labels as people write them, and splits that nobody asked for: read as they were meant, or refused with one line that names the file and the cure."
import os, shutil, warnings

import numpy as np, pandas as pd, pydicom, pytest

from dicomcam.labels import label_table, label_vocab, patient_ids, patient_split
from dicomcam.tables import read_table

@pytest.fixture(scope='module')
def films(folder): return [o.relative_to(folder).as_posix() for o in sorted(folder.rglob('*.dcm'))]

@pytest.fixture
def copy(folder, tmp_path): return shutil.copytree(folder, tmp_path/'copy')

def write(path, rows, encoding='utf-8', name='labels.csv'):
    (path/name).write_bytes(rows.encode(encoding))
    return path

def lines(films, cells, header='file,label', sep=','):
    return '\n'.join([header, *(f'{o}{sep}{cell}' for o, cell in zip(films, cells))])+'\n'

def ab(films): return ['ab'[i%2] for i in range(len(films))]

def refused(path, *says, error=ValueError, **kw):
    "One line, with the name of the CSV in it"
    with pytest.raises(error) as e: label_table(path, **kw)
    text = str(e.value)
    assert '\n' not in text and all(o in text for o in says), text
    if not isinstance(kw.get('labels'), pd.DataFrame): assert 'labels.csv' in text
    return text

# --- cells stay text

@pytest.mark.parametrize('names', [('01', '1'), ('NA', 'None'), ('nan', 'null'), ('1.0', '1'), ('True', 'no'), ('1e3', '1000')])
def test_classes_are_what_was_written(copy, films, names):
    write(copy, lines(films, [names[i%2] for i in range(len(films))]))
    assert label_vocab(label_table(copy)) == sorted(names)

def test_a_file_whose_name_is_a_number(copy, films):
    for i, o in enumerate(films[:4]): shutil.copy(copy/o, copy/f'000{i}')
    write(copy, 'file,label\n0000,a\n0001,b\n0002,a\n0003,b\n')
    assert [o.name for o in label_table(copy).file] == ['0000', '0001', '0002', '0003']

@pytest.mark.parametrize('suffix', ['.dcm', ''])
def test_no_header_row(copy, films, suffix):
    if not suffix:
        for i, o in enumerate(films): (copy/o).rename(copy/f'IM{i}')
        films = [f'IM{i}' for i in range(len(films))]
    write(copy, lines(films, ab(films)).split('\n', 1)[1])
    table = label_table(copy)
    assert len(table) == len(films) and table.label.tolist() == ab(films)
    df = pd.read_csv(copy/'labels.csv') # as somebody would who does not think of it either
    refused(copy, 'header=None', labels=df)
    assert label_table(copy, pd.read_csv(copy/'labels.csv', header=None)).equals(table)

def test_no_header_row_and_its_image_is_not_there(copy, films):
    write(copy, lines(films, ab(films)).split('\n', 1)[1])
    (copy/films[0]).unlink()
    refused(copy, '1 of 30 files are not there', films[0], error=FileNotFoundError)

@pytest.mark.parametrize('encoding, sep, end', [('utf-8', ';', '\r\n'), ('utf-8-sig', ',', '\n'), ('utf-8-sig', ';', '\r\n'), ('utf-16', ',', '\r\n'),
    ('utf-16', '\t', '\n'), ('utf-8', '\t', '\n'), ('utf-8', ',', '\r')])
def test_what_spreadsheets_write(copy, films, encoding, sep, end):
    names = ['Ödem' if i%2 else 'ohne' for i in range(len(films))]
    write(copy, lines(films, names, f'file{sep}label', sep).replace('\n', end)+f'{sep}{end}{end}', encoding)
    table = label_table(copy, file_col='file', label_col='label')
    assert table.label.tolist() == names

@pytest.mark.parametrize('cells', [' {},  {} \n', '"{}","{}"\n', '{} ,\t{}\n', '{},{},,\n'])
def test_blanks_and_quotes(copy, films, cells):
    write(copy, ' file , label \n'+''.join(cells.format(o, cls) for o, cls in zip(films, ab(films))))
    assert label_table(copy, file_col='file', label_col='label').label.tolist() == ab(films)

def test_paths_of_windows(copy, films):
    write(copy, lines([o.replace('/', '\\') for o in films], ab(films)))
    assert label_table(copy).file.tolist() == [copy/o for o in films]

@pytest.mark.parametrize('data, says', [
    (b'', 'empty'), (b'\n  \n', 'empty'), (b'file\na.dcm\n', 'needs two columns'), (b'file,label\n', 'no label'), (b'\xef\xbb\xbf', 'empty'),
    (b'PK\3\4'+bytes(50), 'a spreadsheet'), (b'\xd0\xcf\x11\xe0'+bytes(50), 'a spreadsheet'),
    ('file,label\na.dcm,Ödem\n'.encode('latin-1'), 'line 2 is not UTF-8'), ('file,label\na.dcm,b\n'.encode('utf-16-le'), 'NUL'), (b'\xff\xfea', 'not UTF-16'),
    (b'file,label\na.dcm,b,c\n', 'line 2 has 3 cells, the first has 2'), (b'file,label\na.dcm,b\nc.dcm\n', 'line 3 has 1 cells'),
    (b'file,label\na.dcm,"b\nc.dcm,a\n', 'unexpected end'), (b'file,label\na.dcm,'+b'x'*200_000+b'\n', 'field larger'),
    (b'file,label\n ,b\n', 'row 1 names no file'), (b'file,label\n\\\\x\\y.dcm,b\n', 'not there'), (b'file,label\n'+b'x'*5000+b',b\n', 'not there'),
])
def test_no_table(copy, data, says):
    (copy/'labels.csv').write_bytes(data)
    refused(copy, says, error=(ValueError, FileNotFoundError))

def test_one_file_spelled_in_two_ways(copy, films):
    df = pd.DataFrame(dict(file=films, label=ab(films)))
    assert len(label_table(copy, df.assign(file=[f'masks/../{o}' for o in films]))) == 30
    (copy/'link.dcm').symlink_to(copy/films[0])
    for again in 'link.dcm', f'masks/../{films[0]}', str(copy/films[0]), f'./{films[0]}':
        refused(copy, 'more than once', films[0], labels=pd.concat([df, pd.DataFrame(dict(file=[again], label='a'))]))

def test_folders_as_labels(copy, films, monkeypatch):
    (copy/films[0]).rename(copy/films[0].replace('.dcm', '.DCM'))
    monkeypatch.chdir(copy.parent)
    assert len(label_table('copy', labels=None)) == 30 # a relative path, and a file from a CD
    shutil.rmtree(copy/'train')
    with pytest.raises(ValueError, match='labels from folder names.*no label'): label_table(copy, labels=None)

# --- classes

@pytest.mark.parametrize('names', [('Mass', 'mass'), ('Über', 'U\u0308ber'), ('a', 'a\u200b'), ('fine', 'ﬁne')])
def test_classes_that_look_the_same(copy, films, names):
    write(copy, lines(films, [names[i%2] for i in range(len(films))]))
    refused(copy, 'look the same')

def test_a_class_that_is_a_report(copy, films, name='x'*300):
    refused(copy, 'Is it the right column or folder?', labels=pd.DataFrame(dict(file=films, label=[('ok', name)[i%2] for i in range(30)])))

def test_blanks_are_no_part_of_a_class(copy, films):
    df = pd.DataFrame(dict(file=films, label=[('a b', ' a  b', 'a\nb ', 'c')[i%4] for i in range(30)]))
    assert label_vocab(label_table(copy, df)) == ['a b', 'c']
    for nothing in '', ' ', None, np.nan: refused(copy, 'no label for', films[1], labels=df.assign(label=['a', nothing]*15))

ODD = ['bell\a \x1b[31m', "Hodgkin's \"B\"", '=1+1', '🫁👩‍⚕️', '$_$', '<script>', 'label', 'file', 'group', 'is_valid', 'fold', 'loss', 'patient', 'side']

def test_odd_classes(folder, films):
    from dicomcam.batches import dicom_dls, split_counts
    df = pd.DataFrame(dict(file=films, label=[ODD[i%len(ODD)] for i in range(30)]))
    dls = dicom_dls(folder, df, size=32, by=None, cache=False) # two images of each
    assert list(dls.vocab) == sorted(ODD) and split_counts(dls).images.sum() == 30
    assert dls.setup.table.label.tolist() == df.label.tolist()

def test_odd_classes_as_columns(folder, films):
    from dicomcam.batches import dicom_dls, split_counts
    df = pd.DataFrame(dict(film=films) | {name: [(i//(k+1))%2 for i in range(30)] for k, name in enumerate(ODD)})
    table = label_table(folder, df, file_col='film', label_col=ODD)
    assert list(table) == ['file', 'label', 'group'] # is_valid and fold are classes here
    assert table.label.tolist() == [tuple(name for name in ODD if df[name][i]) for i in range(30)]
    dls = dicom_dls(folder, df[['film', *ODD[:6]]], size=32, label_col=ODD[:6], cache=False)
    assert list(dls.vocab) == sorted(ODD[:6]) and split_counts(dls).images.sum() == 30

# --- several labels an image

@pytest.mark.parametrize('yes, no', [(1, 0), (1., 0.), (True, False), ('1', '0'), ('1.0', '0.0'), ('True', 'FALSE'), (' yes ', 'no')])
def test_columns_of_yes_and_no(copy, films, yes, no):
    df = pd.DataFrame(dict(file=films, a=[yes, no]*15, b=[no, no, yes]*10))
    expected = [tuple(cls for cls, n in (('a', i%2 == 0), ('b', i%3 == 2)) if n) for i in range(30)]
    assert label_table(copy, df, label_col=['a', 'b']).label.tolist() == expected
    df.to_csv(copy/'labels.csv', index=False)
    assert label_table(copy, label_col=['a', 'b']).label.tolist() == expected == label_table(copy, label_col=[1, -1]).label.tolist()

@pytest.mark.parametrize('cell', [-1, np.nan, 'maybe', 'x', 2, '', 0.5])
def test_neither_yes_nor_no(copy, films, cell):
    df = pd.DataFrame(dict(file=films, a=[1, 0]*15, b=[1, 0, cell]*10))
    refused(copy, "column 'b'", films[2], '10 cells', 'label_values', labels=df, label_col=['a', 'b'])
    df.to_csv(copy/'labels.csv', index=False)
    refused(copy, "column 'b'", films[2], label_col=['a', 'b'])

def test_chexpert(copy, films):
    "The caller decides what 'uncertain' and 'not mentioned' count as"
    df = pd.DataFrame(dict(file=films, a=[1, 0]*15, b=[1., 0., -1., np.nan, 1.]*6))
    df.to_csv(copy/'labels.csv', index=False)
    for labels in df, 'labels.csv':
        ones = label_table(copy, labels, label_col=['a', 'b'], label_values={'': 0, -1: 1}).label
        assert [('b' in o) for o in ones] == [True, False, True, False, True]*6
        zeros = label_table(copy, labels, label_col=['a', 'b'], label_values={None: False, '-1': False}).label
        assert [('b' in o) for o in zeros] == [True, False, False, False, True]*6
    with pytest.raises(ValueError, match="'perhaps' is neither"): label_table(copy, df, label_col=['a', 'b'], label_values={-1: 'perhaps'})

def test_tuples_stay_tuples(copy, films):
    df = pd.DataFrame(dict(file=films, label=[('b', 'a'), (), ['b']]*10))
    assert label_table(copy, df).label.tolist() == [('a', 'b'), (), ('b',)]*10
    assert label_table(copy, label_table(copy, df)).label.tolist() == [('a', 'b'), (), ('b',)]*10

def test_columns_of_one_name(copy, films):
    df = pd.DataFrame([[o, 'a', 'b'] for o in films], columns=['file', 'label', 'label'])
    refused(copy, "2 columns 'label'", labels=df, label_col='label')
    refused(copy, 'names a column twice', labels=pd.DataFrame(dict(file=films, a=[0, 1]*15)), label_col=['a', 1])
    refused(copy, 'no column 7', labels=df, label_col=7)
    refused(copy, 'no column -4', labels=df, label_col=-4)

# --- the split

def given(films, valid): return pd.DataFrame(dict(file=films, label=ab(films), is_valid=valid))

@pytest.mark.parametrize('yes, no', [('True', 'False'), ('true', 'no'), ('1', '0'), (1., 0.), ('yes', 'FALSE')])
def test_is_valid(copy, films, yes, no):
    df = given(films, [yes]+[no]*29)
    df.to_csv(copy/'labels.csv', index=False)
    for labels in df, 'labels.csv':
        table = label_table(copy, labels, by=None)
        assert table.is_valid.tolist() == [True]+[False]*29 and patient_split(table)[1].tolist() == [0]
    assert patient_split(table.assign(is_valid=df.is_valid))[1].tolist() == [0] # a table made by hand

@pytest.mark.parametrize('cell', ['', np.nan, 'valid', 2])
def test_is_valid_says_neither(copy, films, cell):
    df = given(films, [1, cell]+[0]*28)
    df.to_csv(copy/'labels.csv', index=False)
    for labels in df, 'labels.csv': refused(copy, "column 'is_valid'", films[1], 'Fill it in', labels=labels)

def test_fold(copy, films):
    df = pd.DataFrame(dict(file=films, label=ab(films), fold=[2, 10, 3]*10))
    df.to_csv(copy/'labels.csv', index=False)
    for labels in df, 'labels.csv', df.assign(fold=df.fold.astype(float)), df.assign(fold=df.fold.astype(str)):
        table = label_table(copy, labels, by=None)
        assert patient_split(table)[1].tolist() == list(range(0, 30, 3)) # 2 is the lowest, not '10'
        for fold in 10, '10', 10.: assert patient_split(table, fold=fold)[1].tolist() == list(range(1, 30, 3))
        assert patient_split(table.assign(is_valid=[True]+[False]*29), fold=3)[1].tolist() == list(range(2, 30, 3))
    df.assign(fold=['b', 'a', 'c']*10).to_csv(copy/'labels.csv', index=False)
    assert patient_split(label_table(copy, by=None), fold='c')[1].tolist() == list(range(2, 30, 3))
    refused(copy, 'no fold for', films[1], labels=df.assign(fold=[2, np.nan, 3]*10))

def test_a_fold_that_is_not_there(folder):
    with pytest.raises(ValueError, match='no column fold'): patient_split(label_table(folder), fold=2)

@pytest.mark.parametrize('share', [0, -.2, .8, 1])
def test_shares_that_are_none(folder, share):
    with pytest.raises(ValueError, match='valid_pct'): patient_split(label_table(folder), valid_pct=share)

# --- whose image is it?

@pytest.mark.parametrize('by, near', [('PatientId', 'PatientID'), ('patientid', 'PatientID'), ('StudyInstanceUId', 'StudyInstanceUID'), ('', ''), (0x100020, '')])
def test_a_mistyped_keyword(folder, by, near):
    for ask in lambda: label_table(folder, by=by), lambda: patient_ids(label_table(folder).file, by):
        with pytest.raises(ValueError, match=f'is no DICOM keyword. Did you mean.*{near}'): ask()

def test_a_keyword_that_no_file_has(folder):
    refused(folder, 'no file has a AccessionNumber', 'by=None', by='AccessionNumber')

def test_a_keyword_that_some_files_lack(copy, films):
    for o in films[:2]:
        ds = pydicom.dcmread(copy/o); ds.PatientID = ' '; ds.save_as(copy/o)
    (copy/films[2]).write_text('no X-ray') # that is another matter, and told elsewhere
    with pytest.warns(UserWarning, match='2 of 30 files have no PatientID') as told: group = label_table(copy, labels=None).group.tolist()
    assert len(told) == 1 and group[:3] == [str(copy/o) for o in films[:3]] and len(set(group[3:])) > 10

def test_nothing_is_said_where_all_is_well(folder):
    with warnings.catch_warnings(action='error'): label_table(folder)

def test_no_two_images_have_the_same_labels():
    label = [tuple(cls for k, cls in enumerate('abcd') if i >> k & 1) for i in range(16)]
    df = pd.DataFrame(dict(label=label, group=[str(i) for i in range(16)]))
    train, valid = patient_split(df)
    for side in train, valid: assert set().union(*df.label.iloc[side]) == set('abcd')

# --- batches

def changed(learn):
    "Do the weights move in one epoch?"
    import torch
    before = [o.detach().clone() for o in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert np.isfinite(learn.recorder.losses).all() and len(learn.recorder.losses)
    return any(not torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))

@pytest.mark.parametrize('bs', [24, 25, 1000])
def test_a_batch_larger_than_the_training_set(folder, films, bs):
    "fastai would drop it, and return the network as it was"
    from dicomcam.batches import dicom_dls
    from tiny import make_tiny
    df = given(films, [False]*24+[True]*6)
    with warnings.catch_warnings(record=True, action='always') as told: dls = dicom_dls(folder, df, size=64, by=None, bs=bs)
    assert [f'bs={bs} is more than the 24 images for training' in str(o.message) for o in told].count(True) == (bs > 24)
    assert dls.bs == 24 and len(dls.train) == 1
    if bs == 1000: assert changed(make_tiny(dls))

@pytest.mark.parametrize('n, bs', [(2, 8), (3, 2), (9, 8), (17, 8), (2, 1)])
def test_few_images_and_one_left_over(folder, films, n, bs):
    "A last batch of one image, which batch norm could not divide, is dropped; a pair is enough"
    from dicomcam.batches import dicom_dls
    from tiny import make_tiny
    df = given(films, [False]*n+[True]*(30-n))
    with warnings.catch_warnings(action='ignore'): dls = dicom_dls(folder, df, size=64, by=None, bs=bs)
    assert len(dls.train) == max(1, n//bs) and len(dls.train_ds) == n
    assert changed(make_tiny(dls))

def test_batches_of_nothing(folder, films):
    from dicomcam.batches import dicom_dls
    for bs in 0, -1:
        with pytest.raises(ValueError, match=f'bs={bs}: a batch holds one image or more'): dicom_dls(folder, size=32, bs=bs)
    with warnings.catch_warnings(action='ignore'), pytest.raises(ValueError, match='1 image for training'):
        dicom_dls(folder, given(films, [False]+[True]*29), size=32, by=None)

def test_a_class_of_which_nothing_can_be_read(copy, films):
    from dicomcam.batches import dicom_dls
    table = label_table(copy)
    for o in table.file[table.label == 'Pneumothorax']: o.write_text('no X-ray')
    with pytest.raises(ValueError, match="None of class 'Pneumothorax' is left"): dicom_dls(copy, size=32, cache=False)

def test_numbers_of_numpy(folder, films):
    "As a loop over `df.fold.unique()` gives them: a model file takes what JSON knows"
    import json
    from dicomcam.batches import dicom_dls
    df = pd.DataFrame(dict(file=films, label=ab(films), fold=[1, 2, 3]*10))
    fold, = np.unique(df.fold)[1:2]
    dls = dicom_dls(folder, df, size=np.int64(32), by=None, fold=fold, seed=np.int32(3), valid_pct=np.float32(.25), cache=False)
    meta = dls.setup.meta()
    assert json.loads(json.dumps(meta)) == meta and type(meta['split']['fold']) is type(meta['split']['seed']) is int

@pytest.mark.parametrize('text', ['"file" , "label"\n"a.dcm" , "x" \n"b.dcm" ,"y"\n', 'sep=;\nfile;label\na.dcm;x\nb.dcm;y\n', 'file,label,\na.dcm,x\nb.dcm,y,\n'])
def test_what_people_and_excel_write(text, tmp_path):
    "Blanks after a quoted cell, Excel's line that names the delimiter, a delimiter at the end of the header"
    (tmp_path/'labels.csv').write_text(text)
    df = read_table(tmp_path/'labels.csv')
    assert df.values.tolist() == [['a.dcm', 'x'], ['b.dcm', 'y']]

def test_blanks_inside_quotes_stay(tmp_path):
    (tmp_path/'labels.csv').write_text('file,label\na.dcm,"x ,y"\nb.dcm,"say ""no"" , please"\n')
    assert read_table(tmp_path/'labels.csv').iloc[:, 1].tolist() == ['x ,y', 'say "no" , please']
