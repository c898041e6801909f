"Process every notebook as the build of the site does, without Quarto: a cell that cannot be run there is an error that names it."
from nbdev.serve import proc_nbs

if __name__=='__main__': print(f'pages in {proc_nbs(n_workers=0, force=True)}')
