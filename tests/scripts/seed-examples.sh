# The two examples of virtproxy's announcement (qemu-devel, 2010-10-22), as they stand there but for the mail's line
# breaks. Each piece runs in another place, so this is not run as a whole: tests/guest_seed.rs gives each to a shell
# there, with `<guest_ip>` and the misspelt `locahost` filled in.

# - Proxy http and ssh connections from a host to a guest over a virtio-serial connection:

# start guest with virtio-serial. for example (RHEL6s13):
qemu \
 -device virtio-serial \
 -chardev socket,path=/tmp/test0-virtioconsole.sock,server,nowait,id=test0 \
 -device virtconsole,chardev=test0,name=test0 \
 -chardev socket,path=/tmp/test1-virtio-serial.sock,server,nowait,id=test1 \
 -device virtserialport,chardev=test1,name=test1 \
 -chardev socket,path=/tmp/test2-virtio-serial.sock,server,nowait,id=test2 \
 -device virtserialport,chardev=test2,name=test2 \
 ...
# in the host:
./qemu-vp -c unix-connect:/tmp/test2-virtio-serial.sock:- -o http:127.0.0.1:9080 \
 -o ssh:127.0.0.1:9022
# in the guest:
./qemu-vp -c virtserial-open:/dev/virtio-ports/test2:- -i http:127.0.0.1:80 \
 -i ssh:127.0.0.1:22

# from host, access guest http server
wget http://locahost:9080
# from host, access guest ssh server
ssh localhost -p 9022

# - Proxy http and ssh connections from a host to a guest over a network connection:

# start guest with network connectivity to host
# in the guest:
./qemu-vp -c tcp-listen:<guest_ip>:9000 -i http:127.0.0.1:80 \
 -i ssh:127.0.0.1:22
# in the host:
./qemu-vp -c tcp-connect:<guest_ip>:9000 -o http:127.0.0.1:9080 \
 -o ssh:127.0.0.1:9022
