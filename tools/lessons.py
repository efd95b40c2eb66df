"""How long the lessons take, and what a reader would trip over: python tools/lessons.py [nbs]

A line a lesson: words, lines of code that a reader sees, minutes (200 words and 15 lines a minute), pictures, and the most lines of
code between two pictures. Then a line for each limit that a lesson breaks. Exit status 1 if there is one, else 0. What is hidden
(`#| hide`, `#| include: false`) is not read, nor is an answer that is folded away. A name that visible code takes from a hidden
cell has to be named in the text. Standard library only."""
import ast, json, re, sys
from dataclasses import dataclass, field
from pathlib import Path

MINUTES, CELL, WIDTH, BETWEEN = 20, 12, 100, 20
WORDS_A_MINUTE, LINES_A_MINUTE = 200, 15
QUESTIONS, TASKS, LINKS = (8, 12), 2, 3

HIDDEN = re.compile(r'^#\|\s*(hide|include:\s*false)\s*$', re.M)
ANSWER = re.compile(r'</summary>.*?</details>', re.S)
DRAWN = re.compile(r'!\[[^\]]*\]\(|<img\b|<svg\b')

@dataclass
class Lesson:
    "What a reader of one notebook meets"
    name: str
    words: int = 0
    lines: int = 0
    pictures: int = 0
    between: int = 0 # most lines of code between two pictures
    broken: list = field(default_factory=list)

    @property
    def minutes(self): return self.words/WORDS_A_MINUTE + self.lines/LINES_A_MINUTE

def words_of(prose):
    "Words that are read: no answer that is folded away, no address, no tag."
    prose = ANSWER.sub('</summary>', prose)
    prose = re.sub(r'\]\([^)]*\)|<[^>]+>|https?://\S+', ' ', prose)
    return len(re.findall(r"[\w'’.-]*\w", prose))

def code_of(source): return [o for o in source.splitlines() if o.strip() and not o.startswith('#|')]

def names_of(source):
    "Names that a cell takes from elsewhere, and names that it makes; what it imports is neither"
    lines = ['' if o.startswith(('%', '!')) else o for o in source.splitlines()]
    found = list(ast.walk(ast.parse('\n'.join(lines))))
    made = {o.name for o in found if isinstance(o, (ast.FunctionDef, ast.ClassDef))}
    made |= {o.arg for o in found if isinstance(o, ast.arg)}
    used = {o.id for o in found if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Load)}
    made |= {o.id for o in found if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store)}
    return used, made

def section(prose, title):
    "Text below the heading `title`, up to the next heading"
    found = re.search(rf'^#+ {title}[^\n]*\n(.*?)(?=^#|\Z)', prose, re.M|re.S|re.I)
    return found[1] if found else ''

def measure(fn):
    "One lesson: its numbers, and the limits it breaks"
    cells = json.loads(fn.read_text(encoding='utf-8'))['cells']
    lesson, since, prose = Lesson(fn.stem), 0, ''
    told, plumbing = set(), set() # names of visible cells, of hidden ones
    for i, cell in enumerate(cells):
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            prose += source + '\n\n'
            lesson.words += words_of(source)
            drawn = bool(DRAWN.search(source))
        elif cell['cell_type'] == 'code' and HIDDEN.search(source):
            used, made = names_of(source)
            plumbing |= made - used # what a test makes smaller is the library's all the same
            continue
        elif cell['cell_type'] == 'code':
            code = code_of(source)
            used, made = names_of(source)
            told |= made
            for name in sorted((used & plumbing) - told):
                if f'`{name}`' not in prose and 'echo: false' not in source: lesson.broken.append(f'cell {i}: nothing says what {name} is')
            lesson.lines += len(code)
            since += len(code)
            drawn = any(kind.startswith('image/') for o in cell.get('outputs', []) for kind in o.get('data', {}))
            if len(code) > CELL: lesson.broken.append(f'cell {i}: {len(code)} lines')
            wide = max(map(len, code), default=0)
            if wide > WIDTH: lesson.broken.append(f'cell {i}: a line of {wide} characters')
            if drawn and 'fig-alt:' not in source: lesson.broken.append(f'cell {i}: a picture without `#| fig-alt:`')
            if re.search(r'^#\| fig-alt: .*: ', source, re.M): lesson.broken.append(f'cell {i}: a colon in `#| fig-alt:`, which is YAML')
        else: continue
        lesson.between = max(lesson.between, since)
        if drawn: lesson.pictures, since = lesson.pictures + 1, 0
    if lesson.minutes > MINUTES: lesson.broken.append(f'{lesson.minutes:.1f} minutes')
    if lesson.between > BETWEEN: lesson.broken.append(f'{lesson.between} lines of code without a picture')
    lesson.broken += list(missing(prose))
    return lesson

def missing(prose):
    "What a lesson has at its end"
    asked = len(re.findall(r'<summary>', section(prose, 'Questionnaire')))
    if not QUESTIONS[0] <= asked <= QUESTIONS[1]: yield f'a questionnaire of {asked} questions'
    tasks = len(re.findall(r'^(?:\d+\.|[-*]) ', section(prose, 'Research'), re.M))
    if tasks != TASKS: yield f'{tasks} tasks under "Research"'
    links = section(prose, 'Further reading').count('](')
    if links < LINKS: yield f'{links} links under "Further reading"'
    if 'licen' not in prose.lower() and 'public domain' not in prose.lower(): yield 'no word on the licence of the data'

def lessons(nbs): return [measure(o) for o in sorted(Path(nbs).glob('*.ipynb')) if o.stem != 'index']

if __name__ == '__main__':
    found = lessons(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent/'nbs')
    print(f'{"lesson":16}{"words":>7}{"lines":>7}{"minutes":>9}{"pictures":>10}{"between":>9}')
    for o in found: print(f'{o.name:16}{o.words:7}{o.lines:7}{o.minutes:9.1f}{o.pictures:10}{o.between:9}')
    for o in found:
        for line in o.broken: print(f'{o.name}: {line}')
    sys.exit(any(o.broken for o in found))
