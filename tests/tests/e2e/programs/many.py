# Many files: as many as the host has made in one directory, and as many as are made here.
# Arguments: the directory, how many files there are in `host`, how many to make in `guest`.

at, there, more = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.chdir(at)

listed = os.listdir('host')
check('a directory of the host: every name once', len(listed), there)
check('a directory of the host: no other names', set(listed) == {f'file-{number}' for number in range(there)})
looked = [entry.stat() for index, entry in enumerate(os.scandir('host')) if index % 1000 == 0]
check('a directory of the host: what is told of its files', {about.st_size for about in looked}, {0})

os.mkdir('guest')
for number in range(more):
    os.close(os.open(f'guest/file-{number}', os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
check('a directory of the guest: every name once', sorted(os.listdir('guest')), sorted(f'file-{number}' for number in range(more)))
