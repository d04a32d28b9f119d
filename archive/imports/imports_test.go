package imports

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// plain are imports of modules by their absolute names.
func plain(modules ...string) (all []Import) {
	for _, m := range modules {
		all = append(all, Import{Module: m})
	}
	return all
}

func from(level int, module string, names ...string) []Import {
	return []Import{{Level: level, Module: module, Names: names}}
}

func TestScan(t *testing.T) {
	for _, c := range []struct {
		name, src string
		want      []Import
	}{
		{"nothing", "", nil},
		{"only the keyword", "import", nil},
		{"only the keyword in a line", "import\n", nil},
		{"the keyword and a gap", "import ", nil},
		{"plain", "import a\n", plain("a")},
		{"no newline at the end", "x = 1\nimport a", plain("a")},
		{"dotted", "import a.b.c\n", plain("a.b.c")},
		{"several", "import a, b.c ,d\n", plain("a", "b.c", "d")},
		{"as", "import a as b, c.d as e, f\n", plain("a", "c.d", "f")},
		{"a name that begins with as", "import a, asyncio, as_b\n", plain("a", "asyncio", "as_b")},
		{"one after the other", "import b\nimport a\nfrom c import d\n", append(plain("b", "a"), from(0, "c", "d")...)},
		{"names of the language's alphabet", "import größe, _x1\n", plain("größe", "_x1")},
		{"tabs", "import\ta,\tb\nfrom\tc\timport\td\n", append(plain("a", "b"), from(0, "c", "d")...)},
		{"CRLF", "import a\r\nfrom b import (c,\r\n  d)\r\nimport e, \\\r\n  f\r\n", append(append(plain("a"), from(0, "b", "c", "d")...), plain("e", "f")...)},
		{"from", "from a.b import c, d as e, f\n", from(0, "a.b", "c", "d", "f")},
		{"star", "from a import *\n", from(0, "a")},
		{"parentheses", "from a import (b, c as d,)\n", from(0, "a", "b", "c")},
		{"parentheses without a gap", "from a import(b)\n", from(0, "a", "b")},
		{"lines in parentheses", "from a import (\n    b,  # one, two\n\n    # c,\n    d as\n    e,\n    f\n)\nimport g\n", append(from(0, "a", "b", "d", "f"), plain("g")...)},
		{"parentheses that do not end", "from a import (b,  # c", from(0, "a", "b")},
		{"a comment behind", "import a # b\nfrom c import d# e\n", append(plain("a"), from(0, "c", "d")...)},
		{"a line without parentheses ends", "import a,\nb\n", plain("a")},
		{"continuation", "from a import b, \\\n    c\nimport \\\n  d\n", append(from(0, "a", "b", "c"), plain("d")...)},
		{"relative", "from . import a\nfrom .b import c\nfrom ... import d\nfrom ....e.f import g\n",
			append(append(append(from(1, "", "a"), from(1, "b", "c")...), from(3, "", "d")...), from(4, "e.f", "g")...)},
		{"relative without gaps", "from.a import b\nfrom.import c\n", append(from(1, "a", "b"), from(1, "", "c")...)},
		{"relative with a gap", "from .. a import b\n", from(2, "a", "b")},
		{"a module like the keyword", "from importlib import a\nimport importlib\nfrom import_x import b\n",
			append(append(from(0, "importlib", "a"), plain("importlib")...), from(0, "import_x", "b")...)},
		{"the keyword in words", "important = 1\nreimport a\nfromimport b\nfrom importx a\nimport_c\nimport.d\nimport=e\n", nil},
		{"the keyword in strings", "x = \"import a\"\ny = 'from b import c'\n", nil},
		{"the keyword in comments", "# import a\n#import b\nc = 1  # import d\n", nil},
		{"no module", "from import a\n", nil},
		{"no name of a module", "from a, b import c\nfrom f() import d\nfrom .a. b import e\n", nil},
		{"yield from", "x = yield from a\nraise a from b\n", nil},

		{"def", "def f():\n    import a\nimport b\n", plain("b")},
		{"def of several lines", "def f(\n    x,\n):\n    import a\nimport b\n", plain("b")},
		{"async def", "async def f():\n    import a\n", nil},
		{"def in class", "class A:\n    def f(self):\n        import a\n    import b\n", plain("b")},
		{"block in def", "def f():\n    if x:\n        try:\n            import a\n        finally:\n            pass\n", nil},
		{"class", "class A(B):\n    import a\n    class C:\n        from b import c\n", append(plain("a"), from(0, "b", "c")...)},
		{"try", "try:\n    import a\nexcept ImportError:\n    import b\nelse:\n    import c\nfinally:\n    import d\n", plain("a", "c", "d")},
		{"try in except", "try:\n    import a\nexcept ImportError:\n    try:\n        import b\n    finally:\n        import c\n", plain("a")},
		{"if", "if x:\n    import a\nelif(y):\n    import b\nelse:\n    import c\n", plain("a", "b", "c")},
		{"nested else", "if x:\n    pass\nelse:\n    if y:\n        pass\n    else:\n        import a\n", plain("a")},
		{"else of type checking", "if TYPE_CHECKING:\n    import a\nelse:\n    import b\n", plain("b")},
		{"type checking", "if typing.TYPE_CHECKING:\n    import a\n    if x:\n        import b\nimport c\n", plain("c")},
		{"main", "if __name__ == \"__main__\":\n    import a\n", nil},
		{"with, for, while", "with a:\n  import b\nfor a in b:\n  import c\nwhile a:\n  import d\n", plain("b", "c", "d")},
		{"other words", "lambda:\n  import a\niffy:\n  import b\ntrying:\n  import c\n", nil},
		{"comments and blank lines between", "try:\n\n# outside\n    # inside\n   \t \n\r\n    import a\nexcept E:\n# x\n\n    import b\n", plain("a")},
		{"statements between", "if x:\n    y = 1\n    if z:\n        w()\n    import a\n", plain("a")},
		{"blocks of tabs", "if x:\n\timport a\n\tdef f():\n\t\timport b\n", plain("a")},
		{"a header of two lines", "if (x and\n        y):\n    import a\n", plain("a")},
		{"an indented first line", "    import a\n", plain("a")},
	} {
		t.Run(c.name, func(t *testing.T) {
			var z Scanner
			require.Equal(t, c.want, z.Scan([]byte(c.src)))
			require.Equal(t, c.want, z.Scan([]byte(c.src)), "a scanner is for many sources")
		})
	}
}

func TestScanBounds(t *testing.T) {
	var z Scanner
	scan := func(src string) []Import { return z.Scan([]byte(src)) }
	lines := func(format string, n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	found := scan(lines("import m%d\n", MaxImports+1))
	require.Len(t, found, MaxImports)
	require.Equal(t, fmt.Sprint("m", MaxImports-1), found[MaxImports-1].Module)
	found = scan(strings.Repeat("import "+lines("m%d,", MaxNames-1)+"last\n", MaxImports/MaxNames) + "import more\n")
	require.Len(t, found, MaxImports)
	require.Equal(t, "last", found[MaxImports-1].Module)
	require.Len(t, scan("import "+strings.TrimSuffix(lines("m%d,", MaxNames+1), ",")), MaxNames)

	found = scan("from a import (\n" + lines("n%d,\n", MaxNames+1) + ")\nimport b\n")
	require.Len(t, found, 2)
	require.Len(t, found[0].Names, MaxNames)
	require.Equal(t, plain("b"), found[1:])

	name := strings.Repeat("m", MaxModule)
	require.Equal(t, plain(name), scan("import "+name))
	require.Empty(t, scan("import "+name+"m"))
	require.Equal(t, from(0, name, name), scan("from "+name+" import "+name))
	require.Equal(t, from(0, "a"), scan("from a import "+name+"m"))
	require.Empty(t, scan("from m"+name+" import a"))

	dots := strings.Repeat(".", MaxLevel)
	require.Equal(t, from(MaxLevel, "a", "b"), scan("from "+dots+"a import b"))
	require.Empty(t, scan("from ."+dots+"a import b"))

	head := "from a" + strings.Repeat(" ", maxHead-len("from a"))
	require.Equal(t, from(0, "a", "b"), scan(head+"import b"))
	require.Equal(t, plain("c"), scan(head+" import b\nimport c"))
}

func TestScanLongLines(t *testing.T) {
	var z Scanner
	long := strings.Repeat("x", 1<<20)
	require.Equal(t, plain("a", "b"), z.Scan([]byte("x = '"+long+" import c'\nimport a\nimport b\n# "+long)))
	require.Equal(t, plain("a"), z.Scan([]byte("import a, "+long)))
	require.Equal(t, plain("a"), z.Scan([]byte("if x:\n    y = '"+long+"'\n    import a\n")))
}

// TestScanTogether has imports so far apart that the last one is not looked for.
func TestScanTogether(t *testing.T) {
	var z Scanner
	code := strings.Repeat("x = 1\n", together/6)
	require.Equal(t, plain("a", "b"), z.Scan([]byte(code+code+"import a\n"+code[:together-104]+"import b\n")))
	require.Equal(t, plain("a"), z.Scan([]byte("import a\n"+code+"import b\n"+"import c\n")))
	require.Equal(t, plain("a"), z.Scan([]byte("import a\n"+code+"    import b\n")), "what is no import does not count")
}

// TestScanOnce has lines that would each begin a list of all names behind it.
func TestScanOnce(t *testing.T) {
	var z Scanner
	found := z.Scan([]byte(strings.Repeat("from.import as as ,\\\n", 4*MaxNames)))
	names := 0
	for _, x := range found {
		names += 1 + len(x.Names)
	}
	require.Greater(t, names, MaxNames)
	require.LessOrEqual(t, names, 5*MaxNames)
}

// TestScanWork has blocks so deep that every line would have to be looked at for
// each import: what is too much is left out, and what needs no look stays.
func TestScanWork(t *testing.T) {
	var z Scanner
	body := strings.Repeat("    x = 1\n", 1000)
	require.Len(t, z.Scan([]byte("if x:\n"+body+"    import a\n"+"import b\n")), 2)
	found := z.Scan([]byte("if x:\n" + body + strings.Repeat("    import a\n", 300) + "import b\n"))
	require.Greater(t, len(found), 2)
	require.Less(t, len(found), 300)
	require.Equal(t, plain("b"), found[len(found)-1:])
}

// What sources of a whole layer name must not add up in memory.
func TestScannerForgets(t *testing.T) {
	var z Scanner
	for i := range 2 * maxKnown / MaxNames {
		var b strings.Builder
		b.WriteString("def f():\n    from a import ")
		for k := range MaxNames {
			fmt.Fprintf(&b, "n%d_%d,", i, k)
		}
		require.Empty(t, z.Scan([]byte(b.String())))
	}
	require.LessOrEqual(t, len(z.known), maxKnown)
}

// requireBounds fails unless what was found is something that a list may have.
func requireBounds(t *testing.T, found []Import) {
	t.Helper()
	require.LessOrEqual(t, len(found), MaxImports)
	for _, x := range found {
		require.True(t, x.Level >= 0 && x.Level <= MaxLevel, "level %d", x.Level)
		require.True(t, x.Level > 0 || x.Module != "")
		require.LessOrEqual(t, len(x.Module), MaxModule)
		require.LessOrEqual(t, len(x.Names), MaxNames)
		for _, name := range x.Names {
			require.True(t, name != "" && len(name) <= MaxModule, "%q", name)
		}
	}
}

func FuzzScan(f *testing.F) {
	for _, src := range []string{
		"import a.b as c, d\n", "from . import (a, # b\n c)\n", "try:\n\timport a\nexcept E:\n\timport b\n", "fromimport x", "import",
		"from.import as as ,\\\n", "if x:\r\n  from ..a import *\r\n", "from a import \xff\xfe, b", "def f():\n  import a", "import (a,\n#\n",
	} {
		f.Add([]byte(src))
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		var z Scanner
		found := z.Scan(src)
		requireBounds(t, found)
		require.Equal(t, found, z.Scan(src))
		l, err := Open(Append(nil, []Source{{Entry: 7, Imports: found}}))
		require.NoError(t, err)
		require.Equal(t, 1, l.Len())
		require.Equal(t, 7, l.Entry(0))
		require.Equal(t, found, l.Source(0).Imports)
	})
}
