# The host fails, or takes away what was shared: the errors that a filesystem of the guest's own would give, and nothing
# hangs. Arguments: directories that the host shares. The host does what it is asked for.

import mmap

full, swapped, unmounted = sys.argv[1:]
chunk = b'\x07' * (64 << 10)

def put(path, data, fsync=False):
    with open(path, 'wb', buffering=0) as file:
        file.write(data)
        if fsync:
            os.fsync(file)

def whole(path):
    with open(path, 'rb') as file:
        return file.read()

def until_it_fails(action, most):
    for count in range(most):
        try:
            action(count)
        except OSError as error:
            return count, errno.errorcode[error.errno]
    return most, 'no error'

# Of 1 MiB and 64 names.
os.chdir(full)
put('kept', b'kept', fsync=True)
fd = os.open('large', os.O_WRONLY | os.O_CREAT, 0o644)
written = 0
def write(_):
    global written
    written += os.write(fd, chunk)
count, error = until_it_fails(write, 32)
check('a full disk: the error', error, 'ENOSPC')
check('a full disk: what was written is synced', failure(lambda: os.fsync(fd)), None)
check('a full disk: what was written is there', whole('large') == (chunk * 32)[:written])
room = os.statvfs('.')
check('a full disk: there is no room', (room.f_bavail, room.f_blocks * room.f_frsize), (0, 1 << 20))
more = failure(lambda: os.posix_fallocate(fd, 0, 4 << 20))
check('a full disk: no room in advance', more, 'ENOSPC')
host(f'full {written}')
os.ftruncate(fd, 0)
put('more', chunk, fsync=True)
check('with room again: it goes on', whole('more'), chunk)
os.unlink('more')
_, error = until_it_fails(lambda number: put(f'name-{number}', b''), 100)
check('a disk full of names: the error', error, 'ENOSPC')
check('a disk full of names: what was there stays', whole('kept'), b'kept')

os.chdir(swapped)
put('file', b'old')
fd = os.open('file', os.O_RDWR)
mapped = mmap.mmap(fd, 3)
host('replace file by a directory')
eventually('a directory in its place: it is seen', lambda: os.path.exists('file/inner'))
check('a directory in its place: no file', failure(lambda: whole('file')), 'EISDIR')
check('a directory in its place: what is in it', whole('file/inner'), b'inner\n')
check('what was open: is read', os.pread(fd, 10, 0), b'old')
os.pwrite(fd, b'newer', 0)
os.fsync(fd)
check('what was open: is written', os.pread(fd, 10, 0), b'newer')
check('what was open: is mapped', bytes(mapped), b'new')
os.ftruncate(fd, 2)
check('what was open: is cut', os.fstat(fd).st_size, 2)
os.close(fd)
os.mkdir('dir')
put('dir/known', b'')
here = os.open('dir', os.O_RDONLY)
host('replace dir by a file')
eventually('a file in its place: it is seen', lambda: os.path.isfile('dir'))
check('a file in its place: nothing in it', failure(lambda: os.stat('dir/known')), 'ENOTDIR')
check('an open directory that is gone: is empty', os.listdir(here), [])

os.chdir(unmounted)
put('file', b'data')
fd = os.open('file', os.O_RDWR)
host('unmount')
check('unmounted: what was known is read', whole('file'), b'data')
put('after', b'after')
check('unmounted: something new is made', whole('after'), b'after')
os.pwrite(fd, b'more', 4)
os.fsync(fd)
check('unmounted: an open file is written', os.pread(fd, 10, 0), b'datamore')
check('unmounted: it is listed', sorted(os.listdir('.')), ['after', 'file'])
