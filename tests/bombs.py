"Small files that would keep a reader busy for long, or fill its memory: made here, byte by byte"
import struct, zlib

UNDEFINED = 0xffffffff
EXPLICIT, IMPLICIT, DEFLATED = (f'1.2.840.10008.1.2{o}' for o in ('.1', '', '.1.99'))
LONG = ('OB', 'OW', 'SQ', 'UC', 'UT', 'UN')
END = struct.pack('<HHI', 0xfffe, 0xe0dd, 0) # of a sequence of undefined length

def element(tag, vr, value=b'', implicit=False, length=None):
    group, number = divmod(tag, 1<<16)
    n = len(value) if length is None else length
    if implicit: return struct.pack('<HHI', group, number, n) + value
    return struct.pack('<HH2s2xI' if vr in LONG else '<HH2sH', group, number, vr.encode(), n) + value

def item(b=b'', length=None): return struct.pack('<HHI', 0xfffe, 0xe000, len(b) if length is None else length) + b

def sequence(items, undefined=False, tag=0x00081140, implicit=False):
    return element(tag, 'SQ', items + END, implicit, UNDEFINED) if undefined else element(tag, 'SQ', items, implicit)

def values(one, n):
    "About `n` bytes of this value, over and over"
    b = one*max(1, n//len(one))
    return b + b' '*(len(b)%2)

def meta(ts, private=b''):
    uid = ts.encode() + b'\0'*(len(ts)%2)
    b = private + element(0x00020010, 'UI', uid) if private[:2] < b'\2\0' else element(0x00020010, 'UI', uid) + private
    return bytes(128) + b'DICM' + element(0x00020000, 'UL', struct.pack('<I', len(b))) + b

def film(first=b'', then=b'', ts=EXPLICIT, private=b''):
    "An 8 x 8 film with `first` in its header, and `then` before its pixel data"
    implicit = ts == IMPLICIT
    def us(number, value): return element(0x00280000 | number, 'US', struct.pack('<H', value), implicit)
    image = us(2, 1) + element(0x00280004, 'CS', b'MONOCHROME2 ', implicit)
    image += b''.join(us(*o) for o in ((0x10, 8), (0x11, 8), (0x100, 8), (0x101, 8), (0x102, 7), (0x103, 0)))
    return meta(ts, private) + first + image + then + element(0x7fe00010, 'OW', bytes(range(64)), implicit)

def many(n, vr='LO', value=b''):
    "`n` private elements of this value"
    return b''.join(element((0x0011 + 2*(i//60000))<<16 | 0x1000 + i%60000, vr, value) for i in range(n))

def texts(vr, tag, one):
    return lambda n: film(element(tag, vr, values(one, n), True), ts=IMPLICIT)

def deflate(n):
    "A file whose dataset inflates to 100 times `n`; the transfer syntax lies behind the first 64 KiB"
    c = zlib.compressobj(9, wbits=-15)
    b = c.compress(element(0x00091010, 'OB', length=100*n))
    zeros = bytes(1<<20)
    b += b''.join(c.compress(zeros) for _ in range(100*n>>20)) + c.flush()
    first = element(0x00020002, 'UT', bytes(70_000))
    return bytes(128) + b'DICM' + first + element(0x00020010, 'UI', DEFLATED.encode()) + b

def within(n, undefined):
    "Sequences in sequences"
    if undefined: return film((element(0x00081140, 'SQ', length=UNDEFINED) + item(length=UNDEFINED))*(n//20))
    b = element(0x00091010, 'OB', bytes(max(0, n-20*1500)))
    for _ in range(min(1500, n//20)): b = sequence(item(b))
    return film(b)

def pretenders(n):
    "Elements that each look like compressed pixel data up to the end of the file: quadratic for whoever believes it"
    def head(i): return element((9 + 2*(i//60000))<<16 | 0x1000 + i%60000, 'OB', length=UNDEFINED)
    return film(head(0) + b''.join(item(END + head(i)) for i in range(1, n//28)))

def charset(name, n): return film(element(0x00080005, 'CS', name) + element(0x00189999, 'UC', values(b'a', n)))

BOMBS = dict(
    deflate=deflate,
    DS=texts('DS', 0x00181041, b'1\\'), IS=texts('IS', 0x00201206, b'1\\'), PN=texts('PN', 0x00081048, b'A\\'),
    UI=texts('UI', 0x00081150, b'x\\'), AT=texts('AT', 0x00280009, b'\x10\0\x20\0'), LO=texts('LO', 0x00081030, b'A\\'),
    US=texts('US', 0x00280106, b'1\0'), DS_long=texts('DS', 0x00181041, b'1.00000000000000000001\\'),
    UC=lambda n: film(element(0x00189999, 'UC', values(b'a\\', n))),
    window=lambda n: film(b'', element(0x00281050, 'DS', values(b'1\\', n), True), ts=IMPLICIT),
    escapes=lambda n: film(element(0x00080005, 'CS', b'\\ISO 2022 IR 87', True) + element(0x00081048, 'PN', values(b'\x1b$BA\\', n), True), ts=IMPLICIT),
    DS_64k=lambda n: film(b''.join(element(0x00091000+i, 'DS', values(b'1\\', 65000)) for i in range(n//65000+1))),
    DS_200=lambda n: film(many(n//208, 'DS', values(b'1\\', 200))),
    tiny=lambda n: film(many(n//10, value=b'AB')), empty=lambda n: film(many(n//8)),
    items=lambda n: film(sequence(item()*(n//8))), items_undefined=lambda n: film(sequence(item()*(n//8), True)),
    items_within=lambda n: film(sequence(item(sequence(item()*(n//8), tag=0x00081199), UNDEFINED) + struct.pack('<HHI', 0xfffe, 0xe00d, 0), True)),
    items_of_one=lambda n: film(sequence(item(element(0x00081030, 'LO', b'AB'))*(n//18))),
    frames=lambda n: film(b'', sequence(item()*(n//8), tag=0x52009230)),
    item_of_many=lambda n: film(sequence(item(many(n//8)))),
    item_of_DS=lambda n: film(sequence(item(b''.join(element(0x00091000+i, 'DS', values(b'1\\', 65000)) for i in range(n//65000+1))))),
    sequences_of_DS=lambda n: film(b''.join(sequence(item(element(0x00091000, 'DS', values(b'1\\', 8000))), tag=0x00111000+i) for i in range(n//8000+1))),
    within=lambda n: within(n, False), within_undefined=lambda n: within(n, True),
    charset=texts('CS', 0x00080005, b'X\\'),
    charset_within=lambda n: film(sequence(item(element(0x00080005, 'CS', values(b'X\\', n), True)), implicit=True), ts=IMPLICIT),
    charset_items=lambda n: film(sequence(item(element(0x00080005, 'CS', b'XY'))*(n//18), True)),
    punycode=lambda n: charset(b'punycode', n), idna=lambda n: charset(b'idna', n),
    punycode_within=lambda n: film(sequence(item(element(0x00080005, 'CS', b'punycode') + element(0x00189999, 'UC', values(b'a', n))))),
    meta=lambda n: film(private=b''.join(element(0x00020100 + i%60000, 'LO') for i in range(n//8))),
    pretenders=pretenders,
    fragments=lambda n: film()[:-76] + element(0x7fe00010, 'OB', item()*(n//8) + END, length=UNDEFINED),
)
