# The server on the host is a user without privileges there, and somebody takes away what it may do.
# Arguments: the directory. The host does what it is asked for.

os.chdir(sys.argv[1])
os.mkdir('dir')
with open('dir/file', 'w') as file:
    file.write('data')
fd = os.open('dir/file', os.O_RDWR | os.O_APPEND)
reading = lambda: open('dir/file').read()
check('before: it is read', reading(), 'data')

host('take dir away')
eventually('taken away: it is not read any more', lambda: failure(reading) == 'EACCES')
check('taken away: it is not written', failure(lambda: open('dir/file', 'a')), 'EACCES')
check('taken away: nothing is made', failure(lambda: open('dir/new', 'w')), 'EACCES')
check('taken away: nothing is removed', failure(lambda: os.unlink('dir/file')), 'EACCES')
check('taken away: it is not listed', failure(lambda: os.listdir('dir')), 'EACCES')
check('taken away: its owner stays', failure(lambda: os.chown('dir', 1, -1)), 'EPERM')
check('taken away: its mode stays', failure(lambda: os.chmod('dir', 0o777)), 'EPERM')
os.write(fd, b' and more')
check('taken away: who has it open keeps it', os.pread(fd, 100, 0), b'data and more')

host('give dir back')
eventually('given back: it is read', lambda: failure(reading) == 'data and more')
check('given back: something is made', failure(lambda: open('dir/new', 'w').close()), None)

# What the host does not let this user be is remembered, and holds in the guest.
with open('owned', 'w'):
    pass
os.chown('owned', 30001, 30002)
os.chmod('owned', 0o4755)
found = os.stat('owned')
check('remembered: owner and set-id bit', (found.st_uid, found.st_gid, found.st_mode & 0o7777), (30001, 30002, 0o4755))
os.mknod('device', 0o20600, os.makedev(1, 3))
found = os.lstat('device')
check('remembered: a device', (found.st_mode, found.st_rdev), (0o20600, os.makedev(1, 3)))
check('remembered: not for use', failure(lambda: os.open('device', os.O_RDONLY)), 'EACCES')
os.chmod('owned', 0)
check("remembered: root's access", failure(lambda: open('owned').read()), '')
