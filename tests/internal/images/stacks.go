package images

import (
	"context"
	"io"
	"path/filepath"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// stacksRecipe changes whenever what Stacks makes changes.
const stacksRecipe = "stacks-3"

// Stack is an image of what people run, and a command that shows that it runs.
type Stack struct {
	Name     string // of the image, in the file that Stacks makes
	Command  []string
	Says     string // in the command's output
	packages []string
}

// AllStacks are the images in the file that Stacks makes: each is Debian and one layer.
func AllStacks() []Stack {
	return []Stack{
		{"example.com/stacks/node:1", []string{"node", "-e", "console.log('sum', [1, 2, 3].reduce((a, b) => a + b))"}, "sum 6", []string{"nodejs"}},
		{"example.com/stacks/java:1", []string{"java", "-version"}, "OpenJDK Runtime Environment", []string{"openjdk-17-jre-headless"}},
		{"example.com/stacks/nginx:1", []string{"sh", "-c", "mkdir -p /var/log/nginx && nginx -t"}, "test is successful", []string{"nginx-light"}},
		{"example.com/stacks/gcc:1", []string{"sh", "-c", compile}, "42", []string{"gcc", "libc6-dev"}},
	}
}

// compile writes, compiles and runs a C program.
const compile = `cd /tmp && printf '#include <stdio.h>\nint main(void) { printf("%%d\\n", 6 * 7); }\n' >x.c && gcc -O2 -o x x.c && ./x`

// Stacks returns the images of AllStacks, an OCI archive in the directory cache, and makes it when it is not there.
func Stacks(ctx context.Context, cache string) (file string, err error) {
	return cached(cache, stacksRecipe+".tar", func(work string) (string, error) { return makeStacks(ctx, cache, work) })
}

func makeStacks(ctx context.Context, cache, work string) (file string, err error) {
	var steps []step
	for _, s := range AllStacks() {
		steps = append(steps, step{name: ShortName(s.Name), commands: install(s.packages...), onBase: true})
	}
	base, err := debian(ctx, cache, work, steps...)
	if err != nil {
		return "", err
	}
	layout, err := NewLayout(filepath.Join(work, "layout"))
	if err != nil {
		return "", err
	}
	upper := func(dir string) func(io.Writer) error {
		return func(w io.Writer) error { return writeUpper(w, dir) }
	}
	bottom, err := layout.AddLayer(upper(base))
	if err != nil {
		return "", err
	}
	config := ocispec.ImageConfig{Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}}
	for _, s := range steps {
		top, err := layout.AddLayer(upper(filepath.Join(work, s.name)))
		if err != nil {
			return "", err
		}
		if _, err := layout.AddImage("example.com/stacks/"+s.name+":1", config, bottom, top); err != nil {
			return "", err
		}
	}
	if err := layout.Finish(); err != nil {
		return "", err
	}
	file = filepath.Join(work, "image.tar")
	return file, layout.WriteTar(file)
}
