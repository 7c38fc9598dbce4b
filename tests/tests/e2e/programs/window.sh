# For folders_window.rs: see there.
set -e
dir=$(mktemp -d /dev/shm/mvm-window.XXXXXX)
trap 'rm -rf "$dir"' EXIT
mkdir -m 700 "$dir/run" "$dir/state" "$dir/data"
export XDG_RUNTIME_DIR="$dir/run" XDG_STATE_HOME="$dir/state"
cd "$dir/data"
for size in 1 16367 16368 16369 16383 16384 16385 65536 1048575 1048576 1048577 3000001 30000000; do
    head -c $size /dev/urandom >file-$size
done
sha1sum file-* >sums
"$mvm" run --name window --rootfs none -m 512M -v "$dir/data:/data" -- sh -ec '
    cd /data
    sha1sum -c -s sums
    for file in file-*; do
        cat $file >copy-$file
    done
    cat file-30000000 >together-1 &
    cat file-30000000 >together-2 &
    dd if=file-30000000 of=odd bs=100003 2>/dev/null
    wait
    # Over part of what is there already, from somewhere in a page on.
    dd if=file-3000001 of=together-2 bs=70001 seek=3 conv=notrunc 2>/dev/null
    sync
    # What the cache has is not what counts.
    echo 3 >/proc/sys/vm/drop_caches
    for file in file-*; do
        cmp $file copy-$file
    done
    cmp file-30000000 together-1
    cmp file-30000000 odd
    # The pinned pages of a window, which the agent has for as long.
    ls -l /proc/1/fd | grep -q io_uring
'
for file in file-*; do
    cmp $file copy-$file
done
cmp file-30000000 together-1
cmp file-30000000 odd
dd if=file-3000001 of=file-30000000 bs=70001 seek=3 conv=notrunc 2>/dev/null
cmp file-30000000 together-2
