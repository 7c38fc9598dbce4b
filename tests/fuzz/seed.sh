#!/bin/sh
# Gives the parsers' fuzz targets small real inputs to start from, below tests/fuzz/corpus. A format
# whose program is missing is passed over. Usage: tests/fuzz/seed.sh
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

has() {
    command -v "$1" > /dev/null || { echo "without $1" >&2; false; }
}
corpus() {
    mkdir -p "corpus/$1" && echo "corpus/$1/$2"
}

head -c 3000 /bin/sh > "$work/file"
tar -C "$work" -cf "$work/data.tar" file

# A payload ends with its unpacked size: 3000 is 0x0bb8.
for program in gzip bzip2 lz4 lzma lzop xz zstd; do
    has "$program" || continue
    case $program in
        lz4) options=-lc ;;
        xz) options='-c --check=crc32' ;;
        *) options=-c ;;
    esac
    {
        # shellcheck disable=SC2086 # several options
        "$program" $options < "$work/file"
        printf '\270\013\000\000'
    } > "$(corpus kernel_unpack "$program")"
done

{ printf '\000'; cat "$work/data.tar"; } > "$(corpus archive_tar plain)"

mkdir "$work/tree" "$work/tree/d"
ln -s ../outside "$work/tree/s"
ln "$work/file" "$work/tree/f"
ln "$work/file" "$work/tree/d/h"
mkfifo "$work/tree/p"
truncate -s 1M "$work/tree/d/sparse"
printf data >> "$work/tree/d/sparse"
for format in gnu pax; do
    { printf '\002'; tar -C "$work/tree" --format "$format" -S -cf - .; } > "$(corpus archive_unpack "$format")"
done
number=1
for program in gzip xz zstd; do
    if has "$program"; then
        { printf "\\00$number"; "$program" -c < "$work/data.tar"; } > "$(corpus archive_tar "$program")"
    fi
    number=$((number + 1))
done

if has ar; then
    echo 2.0 > "$work/debian-binary"
    rm -f "$(corpus archive_deb plain)"
    ar rc "$(corpus archive_deb plain)" "$work/debian-binary" "$work/data.tar"
fi

# The first four bytes are the size in sectors.
if has mkfs.ext4; then
    truncate -s 1M "$work/ext4"
    mkfs.ext4 -qF -O ^has_journal "$work/ext4"
    { printf '\000\010\000\000'; head -c 4096 "$work/ext4"; } > "$(corpus disk_image ext4)"
fi
if has sfdisk; then
    truncate -s 2M "$work/gpt" "$work/mbr"
    printf 'label: gpt\nsize=512K, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709\n' | sfdisk -q "$work/gpt"
    printf 'label: dos\nsize=256K, type=83\nsize=512K, type=5\n' | sfdisk -q "$work/mbr"
    { printf '\000\020\000\000'; head -c 20480 "$work/gpt"; } > "$(corpus disk_image gpt)"
    { printf '\000\020\000\000'; head -c 4096 "$work/mbr"; } > "$(corpus disk_image mbr)"
fi

{
    printf 'a.ko: b.ko.xz c.ko\nb.ko.xz:\nc.ko: b.ko.xz\n\377alias pci:v a\n'
    printf '\377softdep a pre: b post: c\n\377kernel/y.ko\n\377'
} > "$(corpus module_tree small)"
{
    printf IKCFG_ST
    printf 'CONFIG_A=y\n' | gzip -c
    printf IKCFG_ED
} > "$(corpus kernel_config small)"
printf 'CONNECT 1024\n' > "$(corpus vsock_uds small)"
printf '127.0.0.1:8000-8001:9000-9001/udp' > "$(corpus forward_spec range)"
printf '[::1]:8080:/run/guest.sock' > "$(corpus forward_spec path)"
printf '0.0.0.0:5432:[2001:db8::1]:5433' > "$(corpus forward_spec reverse)"
# The first byte is how many are read at a time.
printf '\007\005\001\000\005\001\000\003\002db\000\120early' > "$(corpus proxy_handshake socks5)"
printf '\007\004\001\000\120\000\000\000\001me\000db\000early' > "$(corpus proxy_handshake socks4a)"
printf '\007CONNECT db:80 HTTP/1.1\r\n\r\nearly' > "$(corpus proxy_handshake connect)"
printf '\007GET http://db:80/a HTTP/1.1\r\nConnection: close, a\r\na: b\r\n\r\n' \
    > "$(corpus proxy_handshake forward)"
printf '\007\000\000\000\003\002db\000\065query' > "$(corpus proxy_handshake datagram)"
