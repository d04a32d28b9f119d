package harness

import (
	"context"
	"os"
	"path/filepath"
)

// Credentials and region of the buckets.
const (
	S3AccessKey = "clip-access"
	S3SecretKey = "clip-secret"
	S3Region    = "us-east-1"
)

// S3 is an S3-compatible server with filesystem storage behind a counting proxy.
type S3 struct {
	*Process
	Root string // of its storage: a directory is a bucket, a file in it an object

	proxy *proxy
}

// StartS3 starts an S3-compatible server. It listens on a Unix socket; only the proxy has a port.
func (l *Lab) StartS3(ctx context.Context) (*S3, error) {
	root, socket := l.Path("s3", "root"), l.Path("s3", "s3.sock")
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	process, err := l.start(ctx, "s3", dialable(socket), "versitygw", "--quiet", "--port", socket,
		"--access", S3AccessKey, "--secret", S3SecretKey, "--region", S3Region, "posix", root)
	if err != nil {
		return nil, err
	}
	s := &S3{Process: process, Root: root}
	if s.proxy, err = newProxy(socket); err != nil {
		return nil, err
	}
	l.onClose(func(context.Context) error { return s.proxy.switchOff() })
	return s, nil
}

// Endpoint is the server's URL.
func (s *S3) Endpoint() string { return "http://" + s.proxy.address }

// MakeBucket makes a bucket.
func (s *S3) MakeBucket(name string) error { return os.Mkdir(filepath.Join(s.Root, name), 0o755) }

// Requests are those since the start, in the order in which they ended.
func (s *S3) Requests() Requests { return (&Registry{proxy: s.proxy}).Requests() }
