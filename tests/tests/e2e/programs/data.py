# What programs expect of the files of a filesystem: of data, mappings, locks, holes, times, names and attributes.
# Argument: the directory, which is empty; the host looks at what is left in it.

import ctypes, fcntl, mmap, sqlite3, struct

at = sys.argv[1]
os.chdir(at)

def whole(path):
    with open(path, 'rb') as file:
        return file.read()

def put(path, data):
    with open(path, 'wb') as file:
        file.write(data)

def locks():
    rounds, processes = 15, 4
    kinds = [
        ('flock', fcntl.flock),
        ('fcntl', fcntl.lockf),
    ]
    for name, lock in kinds:
        put('counter', b'0')
        def work(_):
            for _ in range(rounds):
                fd = os.open('counter', os.O_RDWR)
                lock(fd, fcntl.LOCK_EX)
                number = int(os.pread(fd, 20, 0))
                os.pwrite(fd, str(number + 1).encode(), 0)
                lock(fd, fcntl.LOCK_UN)
                os.close(fd)
        check(f'{name}: all who count end', forked(processes, work))
        check(f'{name}: nobody counts twice', whole('counter'), str(rounds * processes).encode())
    # Who will not wait is refused, but for what nobody has locked.
    fd = os.open('counter', os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5)
    other = os.open('counter', os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    def work(_):
        fd = os.open('counter', os.O_RDWR)
        now = fcntl.LOCK_EX | fcntl.LOCK_NB
        check('fcntl: beside a locked range', failure(lambda: fcntl.lockf(fd, now, 5, 0)), None)
        check('fcntl: within a locked range', failure(lambda: fcntl.lockf(fd, now, 1, 14)), 'EAGAIN')
        shared = fcntl.LOCK_SH | fcntl.LOCK_NB
        check('flock: of a locked file', failure(lambda: fcntl.flock(fd, shared)), 'EAGAIN')
    check('locks: who does not wait ends', forked(1, work))

def mappings():
    size = 1 << 20
    put('mapped', bytes(size))
    fd = os.open('mapped', os.O_RDWR)
    def work(number):
        mapped = mmap.mmap(fd, size)
        for place in range(number, size, 4096):
            mapped[place] = ord('a') + number
    check('mmap: two write', forked(2, work))
    mapped = mmap.mmap(fd, size)
    check('mmap: both are seen', all(mapped[n:n + 2] == b'ab' for n in range(0, size, 4096)))
    check('mmap: what is mapped is read', os.pread(fd, 2, 8192), b'ab')
    os.pwrite(fd, b'xy', 12288)
    check('mmap: what is written is mapped', mapped[12288:12290], b'xy')
    mapped.flush()
    check('mmap: the size stays', os.fstat(fd).st_size, size)

def appending():
    lines, writers = 40, 4
    def work(number):
        fd = os.open('log', os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for line in range(lines):
            os.write(fd, f'{number} {line}\n'.encode())
    check('append: all writers end', forked(writers, work))
    found = whole('log').decode().splitlines()
    for number in range(writers):
        own = [line for line in found if line.startswith(f'{number} ')]
        check(f'append: all of {number}, in order', own, [f'{number} {line}' for line in range(lines)])
    check('append: no other line', len(found), lines * writers)

def nameless():
    put('file', b'old')
    fd = os.open('file', os.O_RDWR)
    put('new', b'new')
    os.rename('new', 'file')
    check('rename over an open file: it lives on', os.pread(fd, 10, 0), b'old')
    check('rename over an open file: the name is the new one', whole('file'), b'new')
    check('rename over an open file: no links', os.fstat(fd).st_nlink, 0)
    fd = os.open('file', os.O_RDWR)
    os.unlink('file')
    os.pwrite(fd, b'more', 3)
    os.fsync(fd)
    check('unlink of an open file: it is written', os.pread(fd, 10, 0), b'newmore')
    os.ftruncate(fd, 2)
    check('unlink of an open file: it is cut', os.fstat(fd).st_size, 2)
    check('unlink of an open file: the name is gone', failure(lambda: os.stat('file')), 'ENOENT')
    os.close(fd)
    fd = os.open('.', os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, b'content')
    # Python follows the link only where it is told a directory.
    here = os.open('.', os.O_RDONLY)
    os.link(f'/proc/self/fd/{fd}', 'named', dst_dir_fd=here, follow_symlinks=True)
    check('O_TMPFILE: it gets a name', whole('named'), b'content')

def holes():
    far = (5 << 30) + 4096
    fd = os.open('sparse', os.O_RDWR | os.O_CREAT, 0o644)
    os.pwrite(fd, b'start', 0)
    os.pwrite(fd, b'end', far)
    os.fsync(fd)
    check('beyond 4 GiB: the size', os.fstat(fd).st_size, far + 3)
    check('beyond 4 GiB: the end', os.pread(fd, 10, far), b'end')
    check('holes: they take no room', os.fstat(fd).st_blocks < 1024)
    hole = os.lseek(fd, 0, os.SEEK_HOLE)
    check('SEEK_HOLE: after the start', 0 < hole < far)
    data = os.lseek(fd, hole, os.SEEK_DATA)
    check('SEEK_DATA: before the end', hole < data <= far)
    check('SEEK_HOLE: the end is one', os.lseek(fd, far, os.SEEK_HOLE), far + 3)
    check('SEEK_DATA: none after the end', failure(lambda: os.lseek(fd, far + 3, os.SEEK_DATA)), 'ENXIO')
    libc = ctypes.CDLL(None, use_errno=True)
    punch_and_keep = 2 | 1
    made = libc.fallocate(fd, punch_and_keep, ctypes.c_long(far & ~4095), ctypes.c_long(4096))
    check('fallocate: a hole is punched', (made, ctypes.get_errno() if made else 0), (0, 0))
    check('fallocate: there is nothing in it', os.pread(fd, 10, far), bytes(3))
    os.pwrite(fd, b'end', far)

def times():
    put('times', b'')
    wanted = (1_234_567_890_123_456_789, -3_999_999_999)
    os.utime('times', ns=wanted)
    found = os.stat('times')
    check('times: to the nanosecond, before 1970 too', (found.st_atime_ns, found.st_mtime_ns), wanted)

def names():
    os.mkdir('names')
    wanted = [
        b'n' * 255, b'\xff\xfe not UTF-8 \x80', b' ', b'...', b'new\nline', b'\xe2\x82\xac', b'-rf', b'\\', b'a' * 254 + b'\xff',
    ]
    for name in wanted:
        put(b'names/' + name, name)
    check('names: each as it is', sorted(os.listdir(b'names')), sorted(wanted))
    check('names: each its own file', [whole(b'names/' + name) for name in wanted], wanted)
    check('names: 256 bytes are too many', failure(lambda: put(b'names/' + b'n' * 256, b'')), 'ENAMETOOLONG')

def attributes():
    put('attributes', b'')
    value = bytes(range(256)) * 8
    os.setxattr('attributes', 'user.mine', value, os.XATTR_CREATE)
    check('xattr: kept', os.getxattr('attributes', 'user.mine'), value)
    again = failure(lambda: os.setxattr('attributes', 'user.mine', b'', os.XATTR_CREATE))
    check('xattr: XATTR_CREATE of what there is', again, 'EEXIST')
    missing = failure(lambda: os.setxattr('attributes', 'user.other', b'', os.XATTR_REPLACE))
    check('xattr: XATTR_REPLACE of what there is not', missing, 'ENODATA')
    os.setxattr('attributes', 'user.other', b'')
    os.removexattr('attributes', 'user.other')
    check('xattr: listed', os.listxattr('attributes'), ['user.mine'])
    check('xattr: none of that name', failure(lambda: os.getxattr('attributes', 'user.other')), 'ENODATA')

def entry(tag, permissions, number=0xffffffff):
    return struct.pack('<HHI', tag, permissions, number)

def access_lists():
    user = 30001
    put('listed', b'secret')
    os.chmod('listed', 0o600)
    access, default = 'system.posix_acl_access', 'system.posix_acl_default'
    def read_as(number):
        def work(_):
            os.setgid(number)
            os.setgroups([])
            os.setuid(number)
            whole('listed')
        return forked(1, work)
    os.chmod('.', 0o755)
    check('acl: nobody else reads it', read_as(user), False)
    # u::rw- u:30001:r-- g::--- m::r-- o::---
    acl = struct.pack('<I', 2) + entry(1, 6) + entry(2, 4, user) + entry(4, 0) + entry(16, 4) + entry(32, 0)
    os.setxattr('listed', access, acl)
    check('acl: as it was set', os.getxattr('listed', access), acl)
    check('acl: its mask is the mode of the group', os.stat('listed').st_mode & 0o777, 0o640)
    check('acl: who is listed reads it', read_as(user))
    check('acl: another does not', read_as(user + 1), False)
    os.chmod('listed', 0o600)
    check('acl: chmod sets its mask', read_as(user), False)
    os.mkdir('inherits')
    os.setxattr('inherits', default, acl)
    put('inherits/file', b'')
    check('acl: a new file inherits', entry(2, 4, user) in os.getxattr('inherits/file', access))
    os.mkdir('inherits/deeper')
    check('acl: a new directory inherits', os.getxattr('inherits/deeper', default), acl)

def databases():
    rows, writers = 5, 3
    for mode in ['wal', 'delete']:
        path = f'db-{mode}'
        db = sqlite3.connect(path, timeout=170)
        db.execute(f'pragma journal_mode={mode}')
        db.execute('create table t (writer integer, number integer)')
        db.commit()
        db.close()
        def work(writer):
            db = sqlite3.connect(path, timeout=170)
            for number in range(rows):
                db.execute('insert into t values (?, ?)', (writer, number))
                db.commit()
            db.close()
        check(f'sqlite, {mode}: all writers end', forked(writers, work))
        db = sqlite3.connect(path)
        check(f'sqlite, {mode}: whole', db.execute('pragma integrity_check').fetchone()[0], 'ok')
        check(f'sqlite, {mode}: all rows', db.execute('select count(*) from t').fetchone()[0], rows * writers)
        db.close()

for theme in [locks, mappings, appending, nameless, holes, times, names, attributes, access_lists, databases]:
    theme()
